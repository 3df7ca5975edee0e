"""A sequence taken out of an engine: to put it on disk, or to let it go on twice.

A snapshot has all that the sequence was given and has said, and if it was in the cache, its slots
and open segments. These do not say which pages they came from: any engine with the same model and
the same size of pages can take them in, and then goes on as the first would have.
"""

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmc_jax.core.dmc import OpenSegment
from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete
from dmc_jax.inference.cache import PagedCache, pages_of, reserve
from dmc_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """The rows of one sequence, in NumPy; n is the number of their pages."""

    k_pages: Float[np.ndarray, "n page H"]  # of the first row, then of the second, ...
    v_pages: Float[np.ndarray, "n page H"]
    lengths: Int[np.ndarray, " R"]
    open_segment: OpenSegment | None  # rows (R,)
    position: int  # tokens read


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A sequence between two tokens."""

    model: Mapping[str, Any]  # what the engine was made with; see `Engine`
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]  # new ones so far
    params: SamplingParams
    rows: CachedRows | None  # of all tokens but the last; None: it was not in the cache

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, a NumPy archive without pickles.

        Args:
            path: of the file, which appears when it is complete.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "model": self.model,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "params": dataclasses.asdict(self.params),
        }
        arrays = {} if self.rows is None else _to_arrays(self.rows)
        with appears_when_complete(path) as partial, partial.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)


def load_snapshot(path: str | os.PathLike) -> Snapshot:
    """Read what `Snapshot.save` wrote.

    Args:
        path: of the file.

    Raises:
        UserError: no such file, or not a snapshot.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        params = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in about["params"].items()
        }
        return Snapshot(
            model=about["model"],
            prompt=tuple(about["prompt"]),
            tokens=tuple(about["tokens"]),
            params=SamplingParams(**params),
            rows=_from_arrays(arrays) if arrays else None,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a snapshot of a sequence: {error}") from error


def copy_out(cache: PagedCache, slot: int) -> CachedRows:
    """The rows of one sequence; it stays where it is.

    Args:
        cache: is only read.
        slot: of the sequence.
    """
    table, lengths, segment, position = jax.device_get(
        jax.tree.map(
            lambda x: x[slot],
            (cache.page_table, cache.lengths, cache.open_segment, cache.position),
        )
    )
    ids = _owned(table, lengths, cache)
    pages = _padded(ids, 0)
    return CachedRows(
        k_pages=np.asarray(cache.k_pages[pages])[: ids.size],
        v_pages=np.asarray(cache.v_pages[pages])[: ids.size],
        lengths=lengths,
        open_segment=segment,
        position=int(position),
    )


def copy_in(cache: PagedCache, rows: CachedRows, slot: int) -> PagedCache:
    """Put rows into a slot, with pages from the free list.

    Args:
        cache: given up.
        rows: of a cache with pages of the same size and dtype.
        slot: empty.

    Returns:
        The cache; without enough pages the sequence is marked as `failed`.
    """
    slot = np.int32(slot)
    cache = _reserve(cache, rows.lengths, slot)
    table, granted, failed = jax.device_get(
        (cache.page_table[slot], cache.lengths[slot], cache.failed[slot])
    )
    if failed:
        return cache
    ids = _owned(table, granted, cache)
    outside = cache.free_pages.size  # a page that does not exist is not written
    pages = [np.zeros((_bucket(ids.size), *x.shape[1:]), x.dtype) for x in (rows.k_pages,) * 2]
    for padded, page in zip(pages, (rows.k_pages, rows.v_pages), strict=True):
        padded[: ids.size] = page
    return _write(cache, _padded(ids, outside), *pages, rows.open_segment, rows.position, slot)


@functools.partial(jax.jit, donate_argnames="cache")
def _reserve(cache: PagedCache, lengths: Array, slot: Array) -> PagedCache:
    most = cache.page_table.shape[2]
    return reserve(cache, lengths[None], sequences=slot[None], most=most)[0]


@functools.partial(jax.jit, donate_argnames="cache")
def _write(cache, ids, k_pages, v_pages, segment, position, slot) -> PagedCache:
    return dataclasses.replace(
        cache,
        k_pages=cache.k_pages.at[ids].set(k_pages, mode="drop"),
        v_pages=cache.v_pages.at[ids].set(v_pages, mode="drop"),
        open_segment=jax.tree.map(lambda x, new: x.at[slot].set(new), cache.open_segment, segment),
        position=cache.position.at[slot].set(position),
    )


def _owned(table: np.ndarray, lengths: np.ndarray, cache: PagedCache) -> Int[np.ndarray, " n"]:
    """Pages of a sequence, those of its first row first."""
    owned = np.arange(table.shape[1]) < pages_of(lengths, cache.k_pages.shape[1])[:, None]
    return table[owned]


def _padded(ids: np.ndarray, filler: int) -> np.ndarray:
    """Padded to a power of two, so that few lengths ever compile."""
    return np.pad(ids, (0, _bucket(ids.size) - ids.size), constant_values=filler)


def _bucket(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


# ---- on disk ----------------------------------------------------------------------------------

# NumPy's files know no bfloat16: its bits are kept, and their dtype says what they are.
_BITS = np.uint16


def _to_arrays(rows: CachedRows) -> dict[str, np.ndarray]:
    bfloat16 = rows.k_pages.dtype == jnp.bfloat16
    segment = {} if rows.open_segment is None else vars(rows.open_segment)
    return {
        "k_pages": rows.k_pages.view(_BITS) if bfloat16 else rows.k_pages,
        "v_pages": rows.v_pages.view(_BITS) if bfloat16 else rows.v_pages,
        "lengths": rows.lengths,
        "position": np.array(rows.position),
        **{f"open_segment.{name}": np.asarray(value) for name, value in segment.items()},
    }


def _from_arrays(arrays: dict[str, np.ndarray]) -> CachedRows:
    segment = {
        name.removeprefix("open_segment."): array
        for name, array in arrays.items()
        if name.startswith("open_segment.")
    }
    pages = [arrays["k_pages"], arrays["v_pages"]]
    return CachedRows(
        *(x.view(jnp.bfloat16) if x.dtype == _BITS else x for x in pages),
        lengths=arrays["lengths"],
        open_segment=OpenSegment(**segment) if segment else None,
        position=int(arrays["position"]),
    )
