"""A scheduler whose sequences share what they have in common, and can go back.

A prompt begins with what was read of another that begins alike, or waits for one that is being
read. What is kept for that lies in the pages of the cache, and gives way to whoever runs.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from dmc_jax.errors import UserError
from dmc_jax.inference.kept_rows import pages_of_seats, with_references
from dmc_jax.inference.paged_cache import PagedCache
from dmc_jax.inference.prefix_cache import SHORTEST, Prefix, PrefixCache, count_common
from dmc_jax.inference.requests import Request
from dmc_jax.inference.scheduler import Scheduler


class BranchingScheduler(Scheduler):
    """Requests over one `PagedCache`, which may have pages in common."""

    def __init__(self, *args: Any, rollback: int = 0, **options: Any):
        """Allocate the cache.

        Args:
            args, options: as for `Scheduler`.
            rollback: tokens that a sequence may go back without reading more than a few anew.

        Raises:
            UserError: as for `Scheduler`, fewer than no tokens, or a policy whose caches cannot
                branch.
        """
        if rollback < 0:
            raise UserError(f"rollback: expected tokens, or 0 for none, got {rollback}")
        self._prefixes, self._rollback = PrefixCache(options["policy"]), rollback
        super().__init__(*args, **options)

    def rewind(self, request: Request) -> None:
        """Let a request go on from the tokens that it was cut to, in the seat that it has."""
        if request.seat is not None:
            self._leaving[request.seat], self._unread[request] = True, 0
            request.put_back = False

    def end(self, request: Request, reason: str) -> None:
        """End a request; the next step reports it."""
        if reason == "cancelled" and request in self._speaking():
            self._keep(request)
        super().end(request, reason)

    def _reset(self) -> None:
        super()._reset()
        self._prefixes.forget()
        self._change(with_references(self._batch.cache))

    def _change(self, cache: PagedCache) -> None:
        """Take over a cache in which sequences have what they had; only free pages may differ."""
        self._batch = dataclasses.replace(self._batch, cache=cache)
        if self._counts is not None:
            self._counts = self._counts._replace(free=jax.device_get(cache.free_count))

    # ---- pages for those who run --------------------------------------------------------------

    def _fits(self, request: Request) -> bool | np.bool_:
        needed, prefix = self._pages_needed(request), None
        if request.rows is None and (prefix := self._prefixes.find(*_as_read(request))):
            needed -= prefix.shared
        if not self.running():
            self._spare(needed, but=prefix)
            return True
        if needed > self.tally().free:
            cache = self._batch.cache
            if needed > cache.pages.count - int(pages_of_seats(cache)):
                return False  # whatever is given up
            self._spare(needed, but=prefix)
        return needed <= self.tally().free

    def _make_room(self) -> None:
        self._spare(self._may_take())
        super()._make_room()

    def _spare(self, pages: float, but: Prefix | None = None) -> bool:
        """Give up what is kept, the least recently used first, until so many pages are free.

        Args:
            pages: that are needed; there may be too few in the end.
            but: prefix that stays.

        Returns:
            Whether there was something to give up.
        """
        spared = False
        while len(self._prefixes) > (but is not None):
            free = self.tally().free
            if free >= pages + self._prefixes.pages_beside(self._batch.cache):
                break
            self._change(self._prefixes.evict(self._batch.cache, but))
            spared = True
        return spared

    # ---- what sequences have in common --------------------------------------------------------

    def _share(self) -> set[Request]:
        """Let prompts begin with what was read before, or wait for who reads their beginning.

        Whoever reads for others stops where they go on otherwise, so that it is kept there.

        Returns:
            Those that wait.
        """
        waiting, before = set(), []
        for request, _ in self._by_age():
            tokens, threshold = _as_read(request)
            prefix = self._prefixes.find(tokens, threshold)
            if prefix is not None and len(prefix.tokens) > self._unread[request]:
                self._begin_with(request, prefix)
            begin = self._unread[request]
            common = self._prefixes.in_common(tokens[:-1], threshold)
            request.branch = common if common >= begin + SHORTEST else 0
            for other, theirs, their_threshold in before:
                common = count_common(theirs, tokens[:-1]) if their_threshold == threshold else 0
                if common >= begin + SHORTEST and common > self._unread[other]:
                    other.branch = min(other.branch or common, common)
                    waiting.add(request)
                    break
            before.append((request, tokens, threshold))
        return waiting

    def _begin_with(self, request: Request, prefix: Prefix) -> None:
        self._spare(prefix.copied, but=prefix)
        self._leaving[request.seat] = True
        self.tally()  # which empties the seat
        cache, there = self._prefixes.put(self._batch.cache, prefix, request.seat)
        self._batch, self._counts = dataclasses.replace(self._batch, cache=cache), None
        self._unread[request] = len(prefix.tokens) if there else 0
        if there and not request.tokens:
            request.cached_tokens = len(prefix.tokens)

    def _keep(self, request: Request) -> None:
        if request.put_back:
            return
        counts = self.tally() if self._counts is None else self._counts
        tokens, threshold = _as_read(request)
        tokens = tokens[: counts.position[request.seat]]
        if len(tokens) >= SHORTEST and not counts.failed[request.seat]:
            seat = request.seat
            self._change(self._prefixes.keep(self._batch.cache, seat, tokens, threshold))
            self._spare(0)

    # ---- a way back ---------------------------------------------------------------------------

    def _decode(self) -> None:
        super()._decode()
        for request in self._speaking() if self._rollback else ():
            read = len(request.prompt) + len(request.tokens) - 1
            if read % SHORTEST == 0:
                self._keep(request)
                self._discard_before(request, read)

    def _room_for_draft(self, request: Request) -> int:
        room = super()._room_for_draft(request)
        if self._rollback:  # the next state that is kept is not passed by
            room = min(room, SHORTEST - 1 - (len(request.known) - 1) % SHORTEST)
        return room

    def _discard_before(self, request: Request, read: int) -> None:
        """Give up the state that a way back does not need any more, if it is none of a prompt."""
        past = read - SHORTEST * (1 - -self._rollback // SHORTEST)
        if past > len(request.prompt):
            tokens, threshold = _as_read(request)
            self._change(self._prefixes.discard(self._batch.cache, tokens[:past], threshold))


def _as_read(request: Request) -> tuple[Int[np.ndarray, " n"], float | None]:
    """Give what decides what a request has in the cache: its tokens and its threshold."""
    return np.array(request.known, np.int32), request.params.threshold
