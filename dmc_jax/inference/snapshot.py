"""A sequence taken out of an engine: to put it on disk, or to let it go on twice.

A snapshot has all that the sequence was given and has said, and if it was in the cache, its slots
and what its rows remember beside them. These do not say which pages they came from: any engine with
the same model, policy and size of pages can take them in, and then goes on as the first would have.
"""

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete
from dmc_jax.inference.paged_cache import PagedCache, fitted, pages_of, reserve
from dmc_jax.inference.pages import Pages
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.choice import POLICIES

_CUT = {name for name, policy in POLICIES.items() if policy.observers}  # prompts, at their ends


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """The rows of one sequence, in NumPy; n is the number of their pages."""

    pages: Pages  # n of them: those of the first row, then of the second, ...
    lengths: Int[np.ndarray, " R"]
    state: Mapping[str, np.ndarray]  # the leaves of the policy's state, of rows (R,)
    position: int  # tokens read


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A sequence between two tokens."""

    model: Mapping[str, Any]  # what the engine was made with; see `Engine`
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]  # new ones so far
    params: SamplingParams  # with the threshold that it runs by
    rows: CachedRows | None  # of all tokens but the last; None: it was not in the cache

    def followed_by(self, prompt: Sequence[int]) -> "Snapshot":
        """Let what is in the cache be the beginning of a prompt, which is read on from there.

        Args:
            prompt: ids that begin with all tokens that the rows hold.

        Returns:
            What `Engine.resume` takes: nothing of the prompt is said yet.

        Raises:
            UserError: the snapshot has no rows, or rows of other tokens; or its policy cuts a
                prompt at its end, which moves.
        """
        if self.rows is None:
            raise UserError("the snapshot is of a sequence that was not in the cache")
        if self.model["policy"]["name"] in _CUT:
            raise UserError(f"policy {self.model['policy']['name']} cuts a prompt once, at its end")
        held = (*self.prompt, *self.tokens)[: self.rows.position]
        if len(prompt) <= len(held) or tuple(prompt[: len(held)]) != held:
            raise UserError(f"the prompt does not begin with the {len(held)} tokens that are held")
        return dataclasses.replace(self, prompt=tuple(prompt), tokens=())

    def check(self, model: Mapping[str, Any]) -> None:
        """Refuse an engine that was made with something else.

        Raises:
            UserError: it was.
        """
        for name, value in model.items():
            if (theirs := self.model.get(name)) != value:
                raise UserError(f"the snapshot's {name} is {theirs}, this engine's is {value}")

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, a NumPy archive without pickles.

        Args:
            path: of the file, which appears when it is complete.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "version": _VERSION,
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
        if about.get("version", 1) > _VERSION:
            raise UserError(f"{path} is of version {about['version']}: use a newer dmc_jax")
        rows = _from_arrays(arrays) if arrays else None
        if rows and about.get("version", 1) < 2:
            rows = dataclasses.replace(rows, state=_with_tokens(rows.state))
        if about.get("version", 1) < 3:  # the threshold was the engine's
            params["threshold"] = about["model"].get("policy", {}).pop("threshold", None)
        if about.get("version", 1) < 4:  # pages were of the dtype of the forward pass
            about["model"]["kv_dtype"] = about["model"].get("dtype")
        return Snapshot(
            model=about["model"],
            prompt=tuple(about["prompt"]),
            tokens=tuple(about["tokens"]),
            params=SamplingParams(**params),
            rows=rows,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a snapshot of a sequence: {error}") from error


def copy_out(cache: PagedCache, seat: int) -> CachedRows:
    """Copy the rows of one sequence; it stays where it is.

    Args:
        cache: is only read.
        seat: of the sequence.
    """
    table, lengths, state, position = jax.device_get(
        jax.tree.map(
            lambda x: x[seat], (cache.page_table, cache.lengths, cache.state, cache.position)
        )
    )
    ids = _owned(table, lengths, cache)
    pages = jax.device_get(cache.pages.take(_padded(ids, 0)))
    return CachedRows(
        pages=jax.tree.map(lambda x: x[: ids.size], pages),
        lengths=lengths,
        state={jax.tree_util.keystr(path): leaf for path, leaf in _leaves(state)},
        position=int(position),
    )


def copy_in(cache: PagedCache, rows: CachedRows, seat: int) -> PagedCache:
    """Put rows into a seat, with pages from the free list.

    Args:
        cache: given up.
        rows: of a cache for an equal policy, with pages of the same size and dtype.
        seat: empty.

    Returns:
        The cache; without enough pages the seat is marked as `failed`.
    """
    seat = np.int32(seat)
    cache = _reserve(cache, rows.lengths, seat)
    table, granted, failed = jax.device_get(
        (cache.page_table[seat], cache.lengths[seat], cache.failed[seat])
    )
    if failed:
        return cache
    ids = _owned(table, granted, cache)
    outside = cache.pages.count  # a page that does not exist is not written
    more = _bucket(ids.size) - ids.size

    def padded(x):
        return np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))

    pages = jax.tree.map(padded, rows.pages)
    return _write(cache, _padded(ids, outside), pages, rows.state, rows.position, seat)


@functools.partial(jax.jit, donate_argnames="cache")
def _reserve(cache: PagedCache, lengths: Array, seat: Array) -> PagedCache:
    most = cache.page_table.shape[2]
    return reserve(cache, lengths[None], seats=seat[None], most=most)[0]


@functools.partial(jax.jit, donate_argnames="cache")
def _write(cache, ids, pages, state, position, seat) -> PagedCache:
    def row_written(path, x):
        # Where there is something for each slot, the other cache had room for more or fewer.
        row = fitted(state[jax.tree_util.keystr(path)], x.shape[1:])
        return x.at[seat].set(row.astype(x.dtype))

    return dataclasses.replace(
        cache,
        pages=cache.pages.put(ids, pages),
        state=jax.tree_util.tree_map_with_path(row_written, cache.state),
        position=cache.position.at[seat].set(position),
    )


def _leaves(state):
    return jax.tree_util.tree_flatten_with_path(state)[0]


def _owned(table: np.ndarray, lengths: np.ndarray, cache: PagedCache) -> Int[np.ndarray, " n"]:
    """List the pages of a sequence, those of its first row first."""
    owned = np.arange(table.shape[1]) < pages_of(lengths, cache.pages.page_size)[:, None]
    return table[owned]


def _padded(ids: np.ndarray, filler: int) -> np.ndarray:
    """Pad to a power of two, so that few lengths ever compile."""
    return np.pad(ids, (0, _bucket(ids.size) - ids.size), constant_values=filler)


def _bucket(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


# ---- on disk ----------------------------------------------------------------------------------

# NumPy's files know no bfloat16: its bits are kept, and their dtype says what they are.
_BITS = np.uint16
_STATE = "state"  # before the names of its leaves
_SCALES = "k_scale", "v_scale"  # of int8
_VERSION = 4  # files of version 1 do not say it


def _to_arrays(rows: CachedRows) -> dict[str, np.ndarray]:
    beside = {name: getattr(rows.pages, name) for name in ("tokens", *_SCALES)}
    return {
        "k_pages": _as_bits(rows.pages.k),
        "v_pages": _as_bits(rows.pages.v),
        **{name: _as_bits(x) for name, x in beside.items() if x is not None},
        "lengths": rows.lengths,
        "position": np.array(rows.position),
        **{_STATE + name: _as_bits(np.asarray(leaf)) for name, leaf in rows.state.items()},
    }


def _from_arrays(arrays: dict[str, np.ndarray]) -> CachedRows:
    return CachedRows(
        pages=Pages(
            *(_as_numbers(arrays[name]) for name in ("k_pages", "v_pages")),
            arrays.get("tokens"),
            *(_as_numbers(arrays[name]) if name in arrays else None for name in _SCALES),
        ),
        lengths=arrays["lengths"],
        state={
            name.removeprefix(_STATE): _as_numbers(array)
            for name, array in arrays.items()
            if name.startswith(_STATE)
        },
        position=int(arrays["position"]),
    )


def _as_bits(x: np.ndarray) -> np.ndarray:
    return x.view(_BITS) if x.dtype == jnp.bfloat16 else x


def _as_numbers(x: np.ndarray) -> np.ndarray:
    return x.view(jnp.bfloat16) if x.dtype == _BITS else x


def _with_tokens(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Read a state of version 1, whose open segments hold products of weights and tokens."""
    if ".weights" not in state:
        return state
    weights = np.where(state[".weights"] > 0, state[".weights"], 1)[..., None]
    return {**state, **{name: state[name] / weights for name in (".keys", ".values")}}
