"""Who is in the cache, who waits for a place in it, and what a step does for them.

Pages are promised to nobody: a sequence is admitted if what its prompt should take, at the
compression measured so far, is free, and when a step could run out of pages the youngest sequence
gives its own back and waits to be read again. Since each token depends on its sequence alone (for a
drawn one, on seed and index), it then goes on as before.

Prompts are read in parts, some between every two tokens of those that go on: how long a prompt is,
nobody else has to wait for. Parts that are padded to the same width share a pass.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import RunFailure, UserError
from dmc_jax.inference import programs
from dmc_jax.inference.drafts import check_drafts, look_up, try_drafts
from dmc_jax.inference.paged_cache import pages_of
from dmc_jax.inference.pages import KV_DTYPES
from dmc_jax.inference.prefill import check_chunk, chunk_width, usual_chunk
from dmc_jax.inference.programs import Tally
from dmc_jax.inference.requests import Event, Request, finish, take_token
from dmc_jax.inference.sampling import Chosen
from dmc_jax.inference.snapshot import CachedRows, copy_out
from dmc_jax.model.llama import unstack_layers
from dmc_jax.policies.policy import Policy

_DTYPES = ("float32", "bfloat16")  # of the forward pass
_ROOM = 2048  # tokens of a sequence that page tables have room for, until a longer one comes


class Scheduler:
    """Requests over one `PagedCache`."""

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        policy: Policy,
        dtype: str,
        kv_dtype: str,
        seats: int,
        page_size: int,
        max_length: int,
        chunk: int | None = None,
        prompt_lookup: int = 0,
        **pool: int | None,
    ):
        """Allocate the cache.

        Args:
            params: of the model.
            config: its sizes.
            tokenizer: of the texts; its EOS ends a sequence.
            policy: of the cache.
            dtype: of the forward pass.
            kv_dtype: of keys and values, one of `pages.KV_DTYPES`.
            seats: sequences that run at a time.
            page_size: slots per page.
            max_length: tokens of a sequence.
            chunk: tokens of prompts that a step reads at most; None: as many as `prefill` usually.
            prompt_lookup: tokens of a draft at most; 0: there are none.
            pool: `pages` and `kv_bytes`, as in `programs.init`.

        Raises:
            UserError: as in `programs.init` and `check_drafts`, an unknown dtype, or a bad `chunk`.
        """
        allowed = {"dtype": (dtype, _DTYPES), "kv_dtype": (kv_dtype, KV_DTYPES)}
        for name, (given, known) in allowed.items():
            if given not in known:
                raise UserError(f"{name}: expected {' or '.join(known)}, got {given!r}")
        self._chunk = usual_chunk() if chunk is None else chunk
        check_chunk(self._chunk)
        check_drafts(prompt_lookup, policy)
        self._most_drafted = prompt_lookup
        params = unstack_layers(params, config, jnp.dtype(dtype))
        params = jax.tree.map(jnp.asarray, params)
        # Loaded parameters are bound to their device, fresh arrays to none, and a program is
        # compiled anew for every mixture of the two: here all are bound, from the first call on.
        devices = set().union(*(leaf.devices() for leaf in jax.tree.leaves(params)))
        self._device = devices.pop() if len(devices) == 1 else None  # several: as they are placed
        self._params = jax.device_put(params, self._device)
        self._config, self._tokenizer, self._page_size = config, tokenizer, page_size
        self._policy, self._dtype = policy, dtype
        self._empty_batch = functools.partial(
            programs.init,
            config,
            policy,
            seats=seats,
            page_size=page_size,
            max_length=max_length,
            dtype=dtype,
            kv_dtype=kv_dtype,
            **pool,
        )
        self._max_length, self._room = max_length, min(max_length, _ROOM)
        self._queue: collections.deque[Request] = collections.deque()  # by age
        self._seats: list[Request | None] = [None] * seats
        self._unread: dict[Request, int] = {}  # those in the cache that are read, and how far
        self._events: list[Event] = []  # that the next step reports
        self._reset()

    def enqueue(self, requests: list[Request]) -> None:
        """Let requests wait for a place; their ids are higher than all before."""
        longest = max((len(r.prompt) + r.params.max_new_tokens for r in requests), default=0)
        if longest > self._room:
            # A power of two: every other width compiles anew.
            self._room = min(self._max_length, 1 << (longest - 1).bit_length())
            self._batch = programs.widen(self._batch, self._policy, self._room)
        self._queue.extend(requests)

    def running(self) -> list[Request]:
        """List those in the cache, oldest first."""
        return sorted(filter(None, self._seats), key=lambda request: request.id)

    def unfinished(self) -> list[Request]:
        """List those that run or wait, oldest first."""
        # Who runs is older than whoever waits: the queue is served in order, and the youngest
        # goes back to its head.
        return [*self.running(), *self._queue]

    def tally(self) -> Tally:
        """Count what the cache holds, in NumPy; the seats of those who left are empty then."""
        if self._counts is None or self._leaving.any():
            self._batch, counts = programs.release(self._batch, self._leaving)
            self._leaving = np.zeros_like(self._leaving)
            self._counts = jax.device_get(counts)
        return self._counts

    def rows(self, request: Request) -> CachedRows | None:
        """Copy what a request has in the cache, or will put there; None: it is to be read."""
        if request.seat is None or request in self._unread:
            return request.rows
        return copy_out(self._batch.cache, request.seat)

    def end(self, request: Request, reason: str) -> None:
        """End a request; the next step reports it."""
        self._leave(request)
        self._events.append(finish(request, reason, self._tokenizer))

    def step(self) -> list[Event]:
        """Admit what fits, read on in its prompts, and give every other sequence its next token.

        After an interruption (Ctrl-C) it can go on: what ran is read again.

        Returns:
            What happened since the last step, in order.
        """
        try:
            self._read_prompts()
            self._make_room()
            if self._speaking():
                self._decode()
        except BaseException:
            # The cache was perhaps given up and not replaced.
            self._reset()
            raise
        events, self._events = self._events, []
        return events

    # ---- who is in the cache ------------------------------------------------------------------

    def _reset(self) -> None:
        for request in reversed(self.running()):
            self._requeue(request)
        self._seats, self._unread = [None] * len(self._seats), {}
        self._leaving = np.zeros(len(self._seats), bool)  # seats that are to be emptied
        self._counts: Tally | None = None  # None: the cache has changed since
        self._batch = jax.device_put(self._empty_batch(room=self._room), self._device)

    def _leave(self, request: Request) -> None:
        if request.seat is not None:
            # Emptied when the engine next counts: ending a sequence never waits for the device.
            self._seats[request.seat], self._leaving[request.seat] = None, True
            request.seat = None
            self._unread.pop(request, None)
        elif request in self._queue:
            self._queue.remove(request)

    def _requeue(self, request: Request) -> None:
        self._leave(request)
        self._queue.appendleft(request)

    def _options(self) -> dict[str, Any]:
        """Say what the programs ask for beside arrays."""
        policy = programs.for_requests(self._policy, self._seats)
        return {"policy": policy, "dtype": self._dtype}

    def _speaking(self) -> list[Request]:
        return [request for request in self.running() if request not in self._unread]

    def _may_take(self) -> int:  # pages, in the next step
        return int(sum(self.tally().may_take[request.seat] for request in self._speaking()))

    # ---- one step -----------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Admit what fits, and read parts of prompts that make up a chunk, or the first of them."""
        left = self._chunk
        while True:
            self._admit()
            parts, width = self._next_parts(left, self._share())
            if not parts:
                return
            self._read(parts)
            left -= width * len(parts)

    def _admit(self) -> None:
        while self._queue and None in self._seats and self._fits(self._queue[0]):
            request, seat = self._queue[0], self._seats.index(None)
            self.tally()  # which empties the seat
            self._queue.popleft()
            self._seats[seat], request.seat = request, seat
            request.put_back = request.rows is not None
            if request.rows is None:
                self._unread[request] = 0
                continue
            self._batch, self._counts = programs.put_back(self._config, self._batch, request), None
            if not self._sent_away(request):
                at, request.rows = request.rows.position, None
                if not request.tokens or at < len(request.prompt) + len(request.tokens) - 1:
                    self._unread[request] = at  # the snapshot had less than it is to have

    def _fits(self, request: Request) -> bool | np.bool_:
        if not self.running():
            return True  # nobody can give it more than all
        return self._pages_needed(request) <= self.tally().free

    def _pages_needed(self, request: Request) -> float:
        """Expect so many to be taken before a request that joins can say something."""
        counts = self.tally()
        still = sum(
            max(0.0, self._pages_of(other) - counts.pages[other.seat]) for other in self._unread
        )
        wanted = max(self._pages_of(request), request.pages_wanted)
        return float(still + wanted + self._may_take())

    def _pages_of(self, request: Request) -> float:
        """Expect so many pages to be taken by what is known of a sequence."""
        counts = self.tally()
        read = counts.position.sum()
        slots_per_token = counts.slots.sum() / read if read else self._config.kv_rows
        if self._policy.observers and request.rows is None:
            slots_per_token = self._config.kv_rows  # until its prompt is cut
        tokens = len(request.prompt) + len(request.tokens)
        # Every row begins a page that it does not fill.
        expected = tokens * slots_per_token / self._page_size + self._config.kv_rows
        _, rows, most = self._batch.cache.page_table.shape
        return min(expected, rows * most)

    def _next_parts(
        self, left: int, waiting: set[Request]
    ) -> tuple[list[tuple[Request, int]], int]:
        """Choose who reads in the next pass: the oldest, and others of equal width beside it.

        Their number is a power of 4, so that few shapes ever compile and no row is padding.

        Args:
            left: tokens that may still be read.
            waiting: who does not read now.

        Returns:
            (who and from which token on, the width); nobody where `left` tokens are too few.
        """
        parts = [part for part in self._by_age() if part[0] not in waiting]
        widths = [
            chunk_width(request.part_end(begin, self._chunk) - begin, self._chunk)
            for request, begin in parts
        ]
        equal = [part for part, width in zip(parts, widths, strict=True) if width == widths[0]]
        most = min(len(equal), left // widths[0]) if parts else 0
        if not most:
            return [], 0
        return equal[: 4 ** ((most.bit_length() - 1) // 2)], widths[0]

    def _by_age(self) -> list[tuple[Request, int]]:
        return sorted(self._unread.items(), key=lambda part: part[0].id)

    def _read(self, parts: list[tuple[Request, int]]) -> None:
        self.tally()  # which empties the seats of those who left
        self._counts = None
        self._batch, chosen = programs.read_prompts(
            *(self._params, self._config, self._batch, parts), chunk=self._chunk, **self._options()
        )
        chosen = jax.device_get(chosen)
        for place, (request, begin) in enumerate(parts):
            if request not in self._unread or self._sent_away(request):
                continue
            self._unread[request] = request.part_end(begin, self._chunk)
            self._keep(request)
            if self._unread[request] >= len(request.prompt) + len(request.tokens):
                del self._unread[request]
                self._take(request, chosen, place)

    def _sent_away(self, request: Request) -> bool:
        """Let a sequence wait that found no pages in the cache, and the younger ones behind it."""
        counts = self.tally()
        if not counts.failed[request.seat]:
            return False
        spared = self._spare(np.inf)
        if len(self.running()) == 1 and not spared:
            self.end(request, "pages")
            return True
        # With what it may have had it would fail again.
        request.pages_wanted = int(counts.free + counts.pages[request.seat]) + 1
        for other in reversed(self.running()):
            if other.id >= request.id:
                self._requeue(other)
        return True

    def _make_room(self) -> None:
        """Send the youngest away until the next step cannot run out of pages."""
        while len(running := self.running()) > 1 and self._may_take() > self.tally().free:
            youngest = running[-1]
            counts, seat = self.tally(), youngest.seat
            # With fewer it would be sent away again at once.
            youngest.pages_wanted = int(counts.pages[seat] + counts.may_take[seat])
            self._requeue(youngest)

    def _decode(self) -> None:
        self.tally()  # which empties the slots of those who left
        speaking, drafts = self._speaking(), self._drafts()
        if drafts:
            self._try(drafts)
        if others := [request for request in speaking if request not in drafts]:
            self._next_tokens(others)

    def _next_tokens(self, speaking: list[Request]) -> None:
        columns = programs.columns(
            [request if request in speaking else None for request in self._seats]
        )
        self._batch, chosen, counts = programs.next_tokens(
            self._params, self._config, self._batch, *columns, **self._options()
        )
        chosen, self._counts = jax.device_get((chosen, counts))
        for request in speaking:
            if self._counts.failed[request.seat]:
                # There was room for all but a single sequence, which has the whole pool.
                self.end(request, "pages")
            else:
                self._take(request, chosen, request.seat)

    def _drafts(self) -> dict[Request, list[int]]:
        """Look up drafts, as far as there are pages for them whatever they take."""
        drafts: dict[Request, list[int]] = {}
        if not self._most_drafted:
            return drafts
        counts, rows = self.tally(), self._config.kv_rows
        free = counts.free - self._may_take()
        for request in self._speaking():
            draft = look_up(request.known, self._room_for_draft(request))
            slots = self._policy.most_slots(len(request.known) + len(draft))
            most = rows * pages_of(slots, self._page_size) - counts.pages[request.seat]
            needed = min(rows * pages_of(len(draft), self._page_size), most)
            if draft and needed <= free:
                drafts[request], free = draft, free - needed
        return drafts

    def _room_for_draft(self, request: Request) -> int:
        """Count the tokens that a draft may have; one more is chosen after them."""
        left = request.params.max_new_tokens - len(request.tokens)
        return min(self._most_drafted, left - 1)

    def _try(self, drafts: dict[Request, list[int]]) -> None:
        self._counts = None
        self._batch, chosen, taken, self._counts = try_drafts(
            *(self._params, self._config, self._batch, drafts),
            tokenizer=self._tokenizer,
            width=1 + self._most_drafted,
            **self._options(),
        )
        for place, (request, draft) in enumerate(drafts.items()):
            request.drafted_tokens += len(draft)
            request.accepted_tokens += int(taken[place]) - 1
            for t in range(taken[place]):
                self._take(request, jax.tree.map(lambda leaf, t=t: leaf[:, t], chosen), place)

    def _take(self, request: Request, chosen: Chosen, place: int) -> None:
        token = int(chosen.tokens[place])
        if token < 0:
            self._leave(request)  # others can go on
            raise RunFailure(
                f"sequence {request.id}: after {len(request.prompt) + len(request.tokens)} tokens "
                "the model's logits are NaN or infinite: its weights hold such values, or numbers "
                f"that {self._dtype} cannot compute with"
            )
        request.usage = programs.usage(self._batch.cache, self._counts, request.seat)
        logprob = chosen.logprob(place, request.params.logprobs)
        self._events.append(take_token(request, token, self._tokenizer, logprob))
        if self._events[-1].finish_reason:
            self._keep(request)
            self._leave(request)

    # ---- what `BranchingScheduler` does -------------------------------------------------------

    def _share(self) -> set[Request]:
        """Let prompts begin with what was read before; tell who waits for others to read it."""
        return set()

    def _keep(self, request: Request) -> None:
        """Let others go on from what a request has in the cache."""

    def _spare(self, pages: float) -> bool:
        """Give up what is kept until so many pages are free; tell whether there was something."""
        return False
