"""States of sequences, by the tokens that they have read: who begins alike goes on from there.

Kept rows lie in the pages of the cache, and make way for sequences: the least recently used first.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from dmc_jax.errors import UserError
from dmc_jax.inference.kept_rows import KeptRows, drop, keep, put
from dmc_jax.inference.paged_cache import PagedCache, pages_of
from dmc_jax.policies.policy import Policy

SHORTEST = 32  # tokens that it pays to keep, or to wait for


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """What some tokens leave in the cache."""

    tokens: Int[np.ndarray, " n"]
    threshold: float | None  # by which they were read
    rows: KeptRows
    shared: int  # pages that a sequence has in common with it, if it goes on from here
    copied: int  # and pages that both have for themselves

    @property
    def key(self) -> tuple:
        """What makes it what it is."""
        return self.threshold, self.tokens.tobytes()


class PrefixCache:
    """Prefixes, whose pages those are that `PagedCache.references` counts."""

    def __init__(self, policy: Policy):
        """Keep nothing yet.

        Args:
            policy: of the cache.

        Raises:
            UserError: what its rows hold is not decided by the tokens read alone, or can change.
        """
        if not policy.branches:
            raise UserError(
                f"prefix_cache, rollback: policy {policy.name} writes over any slot of a row, or "
                "keeps what the end of a prompt decides: its caches do not branch"
            )
        self._policy = policy
        self._kept: dict[tuple, Prefix] = {}  # the least recently used first

    def __len__(self):
        return len(self._kept)

    def forget(self) -> None:
        """Have nothing: the cache was lost."""
        self._kept.clear()

    def pages_beside(self, cache: PagedCache) -> int:
        """Count the pages as large as all that is kept beside pages, which the pool pays for."""
        if not self._kept:
            return 0
        rows = next(iter(self._kept.values())).rows
        beside = sum(x.nbytes for x in jax.tree.leaves((rows.page_table, rows.lengths, rows.state)))
        return pages_of(len(self._kept) * beside, cache.pages.page_bytes)

    # ---- what is there ------------------------------------------------------------------------

    def find(self, tokens: Int[np.ndarray, " n"], threshold: float | None) -> Prefix | None:
        """Find the longest prefix that leaves one of some tokens to be read, and so use it."""
        found = max(
            (one for one in self._kept.values() if _begins(one, tokens, threshold)),
            key=lambda prefix: len(prefix.tokens),
            default=None,
        )
        if found is not None:
            self._kept[found.key] = self._kept.pop(found.key)
        return found

    def in_common(self, tokens: Int[np.ndarray, " n"], threshold: float | None) -> int:
        """Count the tokens at the beginning that some prefix has too, which may go on otherwise."""
        alike = (prefix for prefix in self._kept.values() if prefix.threshold == threshold)
        return max((count_common(prefix.tokens, tokens) for prefix in alike), default=0)

    # ---- what changes: caches are given up ----------------------------------------------------

    def keep(
        self, cache: PagedCache, seat: int, tokens: Int[np.ndarray, " n"], threshold: float | None
    ) -> PagedCache:
        """Keep what a seat has read, at the expense of what was used before if need be.

        Args:
            cache: where its sequence did not fail.
            seat: of the sequence.
            tokens: that it has read.
            threshold: by which it did.
        """
        key = threshold, tokens.tobytes()
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)
            return cache
        while True:
            cache, rows, counts = keep(cache, self._policy, np.int32(seat))
            counts = jax.device_get(counts)
            if counts[0] >= 0:
                self._kept[key] = Prefix(tokens, threshold, rows, *map(int, counts))
                return cache
            if not self._kept:
                return cache
            cache = self.evict(cache)

    def put(self, cache: PagedCache, prefix: Prefix, seat: int) -> tuple[PagedCache, bool]:
        """Let an empty seat go on from a prefix; also whether there were enough pages for it."""
        cache, counts = put(cache, self._policy, prefix.rows, np.int32(seat))
        return cache, bool(jax.device_get(counts)[0] >= 0)

    def evict(self, cache: PagedCache, but: Prefix | None = None) -> PagedCache:
        """Give up what was not used for longest, which there must be, but for one prefix."""
        return self._drop(cache, next(one for one in self._kept.values() if one is not but).key)

    def discard(
        self, cache: PagedCache, tokens: Int[np.ndarray, " n"], threshold: float | None
    ) -> PagedCache:
        """Give up what some tokens left, if that is kept."""
        key = threshold, tokens.tobytes()
        return self._drop(cache, key) if key in self._kept else cache

    def _drop(self, cache, key) -> PagedCache:
        return drop(cache, self._kept.pop(key).rows)


def count_common(one: Int[np.ndarray, " n"], other: Int[np.ndarray, " m"]) -> int:
    """Count the tokens that two sequences begin with alike."""
    both = min(len(one), len(other))
    unlike = np.flatnonzero(one[:both] != other[:both])
    return int(unlike[0]) if len(unlike) else both


def _begins(prefix, tokens, threshold) -> bool:
    n = len(prefix.tokens)
    alike = n < len(tokens) and prefix.threshold == threshold
    return alike and np.array_equal(prefix.tokens, tokens[:n])
