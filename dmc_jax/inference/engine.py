"""Many prompts at a time over one `PagedCache`: continuous batching.

Sequences join and leave between steps. Pages are promised to nobody: a sequence is admitted if what
its prompt should take, at the compression measured so far, is free, and when a step could run out
of pages the youngest sequence gives its own back and waits to be read again. Since each token
depends on its sequence alone (for a drawn one, on seed and index), it then goes on as before.
"""

import collections
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference import batch as batch_module
from dmc_jax.inference.batch import Tally
from dmc_jax.inference.requests import (
    Event,
    Params,
    Prompt,
    Request,
    Result,
    finish,
    new_requests,
    take_token,
)
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.interop.native import load_model, load_own_tokenizer


class Engine:
    """Continues prompts, as many at a time as the cache holds.

    Give it prompts with `submit` and drive it with `step`, or let `generate` or `stream` do both.
    Not for several threads.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        settings: DMCSettings | None,
        max_sequences: int,
        threshold: float = 0.0,
        pages: int | None = None,
        kv_bytes: int | None = None,
        page_size: int = 16,
        max_length: int | None = None,
        dtype: str = "float32",
    ):
        """Allocates the cache.

        Args:
            params: of the model.
            config: its sizes.
            tokenizer: of prompts and texts; its EOS ends a sequence.
            settings: DMC settings; None: a dense model.
            max_sequences: that run at a time; others wait.
            threshold: of hard decisions; infinity never merges.
            pages: in the pool. More than all sequences could fill are not allocated.
            kv_bytes: the pool's size in bytes instead of pages.
            page_size: slots per page, a power of two of 8 or more.
            max_length: tokens of a prompt and its continuation; None: what the model knows.
            dtype: of the forward pass, keys and values: float32 or bfloat16.

        Raises:
            UserError: not one of `pages` and `kv_bytes`, a pool without a page for every row of a
                sequence, a length that the model does not know, or what `cache.init` refuses.
        """
        self.config, self.tokenizer = config, tokenizer
        self.max_sequences, self.page_size = max_sequences, page_size
        self.max_length = config.max_length if max_length is None else max_length
        if self.max_length > config.max_length:
            raise UserError(
                f"max_length: the model was made for {config.max_length}, got {self.max_length}"
            )
        self._params = params
        self._options = {"settings": settings, "threshold": threshold, "dtype": dtype}
        self._empty_batch = functools.partial(
            batch_module.init,
            config,
            settings,
            slots=max_sequences,
            pages=pages,
            kv_bytes=kv_bytes,
            page_size=page_size,
            max_length=self.max_length,
            dtype=dtype,
        )
        self._ids = 0
        self._queue: collections.deque[Request] = collections.deque()  # by age
        self._slots: list[Request | None] = []
        self._events: list[Event] = []  # that the next step reports
        self._inboxes: dict[int, collections.deque[Event]] = {}  # of sequences that a stream reads
        self._reset()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        kv_bytes: int = 2**28,
        max_sequences: int = 8,
        policy: str = "dmc",
        tokenizer: str | os.PathLike | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> "Engine":
        """An engine for a checkpoint of ours.

        Args:
            path: a run's directory, a stage of it, or a step.
            kv_bytes: of keys and values in the pool.
            max_sequences: that run at a time.
            policy: "dmc", or "dense" to let the same model take a slot for every token.
            tokenizer: SentencePiece file; None: where it was in training.
            dtype: of the forward pass and the cache; None: that of training.
            options: `page_size`, `max_length` of the engine.

        Raises:
            UserError: no checkpoint there, another tokenizer, an unknown policy, or as for an
                engine.
        """
        if policy not in ("dmc", "dense"):
            raise UserError(f"policy: expected dmc or dense, got {policy!r}")
        model = load_model(path)
        return cls(
            model.params,
            model.config,
            load_own_tokenizer(model, tokenizer),
            settings=model.settings,
            # It stays a DMC model that never merges: no head reads the channel that decides.
            threshold=model.threshold if policy == "dmc" else math.inf,
            kv_bytes=kv_bytes,
            max_sequences=max_sequences,
            dtype=dtype or model.metadata["run"]["compute_dtype"],
            **options,
        )

    # ---- for the user -------------------------------------------------------------------------

    @property
    def unfinished(self) -> list[int]:
        """Ids of the sequences that run or wait, oldest first."""
        return [request.id for request in self._unfinished()]

    @property
    def running(self) -> list[int]:
        """Ids of those in the cache, oldest first."""
        return [request.id for request in self._running()]

    @property
    def free_pages(self) -> int:
        """Of the pool: those that no sequence holds."""
        return int(self._tally().free)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt.

        Args:
            prompt: text, or ids that begin with BOS.
            params: how to continue it; None: the defaults.

        Returns:
            The id of the sequence, higher than all before.

        Raises:
            UserError: no token, an unknown one, or more than `max_length` with the new ones.
        """
        return self._enqueue([prompt], params)[0]

    def cancel(self, sequence: int) -> None:
        """End a sequence; the next step reports it, with what it has. One that ended stays so.

        Args:
            sequence: an id from `submit`.

        Raises:
            UserError: there never was such a sequence.
        """
        if not 0 <= sequence < self._ids:
            raise UserError(f"no sequence {sequence}: there were {self._ids} so far")
        for request in self._unfinished():
            if request.id == sequence:
                self._end(request, "cancelled")

    def step(self) -> list[Event]:
        """Admit what fits, and give every running sequence its next token.

        A sequence that joins gets two. After an interruption (Ctrl-C) the engine can go on: what
        ran is read again.

        Returns:
            What happened since the last step, in order.
        """
        try:
            self._admit()
            self._make_room()
            if self._running():
                self._decode()
        except BaseException:
            # The cache was perhaps given up and not replaced.
            self._reset()
            raise
        events, self._events = self._events, []
        for event in events:
            if event.sequence in self._inboxes:
                self._inboxes[event.sequence].append(event)
        return events

    def stream(
        self, prompts: int | str | Sequence[Prompt], params: Params = None
    ) -> Iterator[Event]:
        """Events of some sequences as they come, until all have ended; others run meanwhile.

        Args:
            prompts: the id of a sequence, or prompts to submit. These are cancelled if the iterator
                is closed before its end.
            params: for all prompts, or one each; None: the defaults. Without meaning for an id.

        Raises:
            UserError: at once; as in `submit`, or the sequence has ended or is streamed already.
        """
        if isinstance(prompts, int):
            if prompts not in self.unfinished or prompts in self._inboxes:
                raise UserError(f"sequence {prompts} has ended, or a stream reads it already")
            ids, own = [prompts], False
        else:
            prompts = [prompts] if isinstance(prompts, str) else prompts
            ids, own = self._enqueue(prompts, params), True
        inbox = collections.deque()
        self._inboxes |= dict.fromkeys(ids, inbox)
        events = self._events_of(ids, inbox, own)
        next(events)  # from here on, closing it cleans up
        return events

    def generate(self, prompts: str | Sequence[Prompt], params: Params = None) -> list[Result]:
        """Continue prompts, all to their ends.

        Args:
            prompts: to submit.
            params: for all, or one each; None: the defaults. Equal prompts with one seed get equal
                texts.

        Returns:
            The results, in the order of the prompts.

        Raises:
            UserError: as in `submit`.
        """
        events = self.stream(prompts, params)
        results = {event.sequence: event.result for event in events if event.finish_reason}
        return [results[sequence] for sequence in sorted(results)]  # ids rise with the prompts

    # ---- what comes in ------------------------------------------------------------------------

    def _enqueue(self, prompts: Sequence[Prompt], params: Params) -> list[int]:
        sizes = {"vocab_size": self.config.vocab_size, "max_length": self.max_length}
        requests = new_requests(prompts, params, self.tokenizer, **sizes)
        for request in requests:
            request.id, self._ids = self._ids, self._ids + 1
        self._queue.extend(requests)
        return [request.id for request in requests]

    def _events_of(self, ids, inbox, own) -> Iterator[Event]:
        left = set(ids)
        try:
            yield
            while left:
                while not inbox:
                    self.step()
                event = inbox.popleft()
                if event.finish_reason:
                    left.discard(event.sequence)
                yield event
        finally:
            for sequence in ids:
                del self._inboxes[sequence]
            for sequence in left if own else ():
                self.cancel(sequence)

    # ---- who is in the cache ------------------------------------------------------------------

    def _running(self) -> list[Request]:
        return sorted(filter(None, self._slots), key=lambda request: request.id)

    def _unfinished(self) -> list[Request]:
        # Who runs is older than whoever waits: the queue is served in order, and the youngest
        # goes back to its head.
        return [*self._running(), *self._queue]

    def _reset(self) -> None:
        for request in reversed(self._running()):
            self._requeue(request)
        self._slots = [None] * self.max_sequences
        self._leaving = np.zeros(self.max_sequences, bool)  # slots that are to be emptied
        self._counts: Tally | None = None  # None: the cache has changed since
        self._batch = self._empty_batch()

    def _tally(self) -> Tally:
        if self._counts is None or self._leaving.any():
            self._batch, counts = batch_module.release(self._batch, self._leaving)
            self._leaving = np.zeros_like(self._leaving)
            self._counts = jax.device_get(counts)
        return self._counts

    def _leave(self, request: Request) -> None:
        if request.slot is not None:
            # Emptied when the engine next counts: ending a sequence never waits for the device.
            self._slots[request.slot], self._leaving[request.slot] = None, True
            request.slot = None
        elif request in self._queue:
            self._queue.remove(request)

    def _requeue(self, request: Request) -> None:
        self._leave(request)
        self._queue.appendleft(request)

    def _end(self, request: Request, reason: str) -> None:
        self._leave(request)
        self._events.append(finish(request, reason, self.tokenizer))

    def _may_take(self) -> int:  # pages, in the next step
        return int(sum(self._tally().may_take[request.slot] for request in self._running()))

    # ---- one step -----------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._queue and None in self._slots and self._fits(self._queue[0]):
            self._join(self._queue[0], self._slots.index(None))

    def _fits(self, request: Request) -> bool:
        if not self._running():
            return True  # nobody can give it more than all
        counts = self._tally()
        slots_per_token = counts.slots.sum() / counts.position.sum()
        tokens = len(request.prompt) + len(request.tokens)
        # Every row begins a page that it does not fill.
        expected = tokens * slots_per_token / self.page_size + self.config.kv_rows
        return max(expected, request.pages_wanted) + self._may_take() <= counts.free

    def _join(self, request: Request, slot: int) -> None:
        free = int(self._tally().free)
        self._queue.popleft()
        self._slots[slot], request.slot = request, slot
        self._counts = None
        self._batch, token = batch_module.read_prompt(
            self._params, self.config, self._batch, request, **self._options
        )
        if not self._tally().failed[slot]:
            self._take(request, int(token))
        elif len(self._running()) == 1:
            self._end(request, "pages")
        else:
            request.pages_wanted = free + 1
            self._requeue(request)

    def _make_room(self) -> None:
        """Send the youngest away until the next step cannot run out of pages."""
        while len(running := self._running()) > 1 and self._may_take() > self._tally().free:
            youngest = running[-1]
            counts, slot = self._tally(), youngest.slot
            # With fewer it would be sent away again at once.
            youngest.pages_wanted = int(counts.pages[slot] + counts.may_take[slot])
            self._requeue(youngest)

    def _decode(self) -> None:
        self._tally()  # which empties the slots of those who left
        columns = batch_module.columns(self._slots)
        self._batch, chosen, counts = batch_module.next_tokens(
            self._params, self.config, self._batch, *columns, **self._options
        )
        chosen, self._counts = jax.device_get((chosen, counts))
        for request in self._running():
            if self._counts.failed[request.slot]:
                # There was room for all but a single sequence, which has the whole pool.
                self._end(request, "pages")
            else:
                self._take(request, int(chosen[request.slot]))

    def _take(self, request: Request, token: int) -> None:
        request.usage = batch_module.usage(self._batch.cache, self._counts, request.slot)
        self._events.append(take_token(request, token, self.tokenizer))
        if self._events[-1].finish_reason:
            self._leave(request)
