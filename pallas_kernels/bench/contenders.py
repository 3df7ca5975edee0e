"""What `bench` compares: the implementations of decode attention, and dense ones beside them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import timing
from pallas_kernels.bench.cases import Case, Pages, make_padded
from pallas_kernels.decode_attention import api, reference
from pallas_kernels.decode_attention.settings import Settings

DENSE = ("dense_xla", "dense_cudnn")

# Relative error of a row's output, by the Euclidean norm. A bfloat16 result is off by 2**-9 at
# most, its weights by as much again; both together stay under this, a missing slot does not.
TOLERANCE = 0.02
_CHECKED_ROWS = 16


class Contender(NamedTuple):
    """What to time: call(q, shared, one of sets) -> output like q."""

    call: Callable[[Any, Any, Any], Any]
    shared: Any
    sets: list[Any]
    read_bytes: int  # by a call, dead slots included where it reads them


class Wrong(Exception):
    """An output that is not the reference's."""


# ---- who takes part ---------------------------------------------------------------------------


def make_contender(
    name: str,
    case: Case,
    pages: Pages,
    cold_bytes: int = timing.COLD_BYTES,
    settings: Settings | None = None,
) -> Contender:
    """Make one of those that are compared.

    Args:
        name: of an implementation, of that with "+plan", or of `DENSE`.
        case: what it shall do.
        pages: of the case.
        cold_bytes: to read before the same again.
        settings: to build an implementation with; None: those kept for this device.
    """
    if name not in DENSE:
        return paged(name, case, pages, settings)
    padded = make_padded(pages, cold_bytes)
    call = _dense_cudnn if name == "dense_cudnn" else _dense_xla
    return Contender(call, pages.lengths, padded, sum(x.nbytes for x in padded[0]))


def paged(name: str, case: Case, pages: Pages, settings: Settings | None = None) -> Contender:
    """One of `decode_attention`'s implementations; NAME+plan makes its plan in every call."""
    implementation, _, inside = name.partition("+")
    if settings is None:
        longest = pages.tables[0].shape[1] * case.page
        attend = functools.partial(api.decode_attention, implementation=implementation)
        plan_rows = functools.partial(
            api.plan_decode_attention, longest=longest, implementation=implementation
        )
    else:
        module = api.IMPLEMENTATIONS.load(implementation)

        def attend(q, k_pages, v_pages, table, lengths, *, scale, plan):
            rows = table[None], lengths[None]  # of one layer, which is all
            return module.decode_attention(
                *(q, k_pages, v_pages, *rows, scale, plan), settings=settings
            )

        plan_rows = functools.partial(module.plan_rows, settings=settings)
    plan = None if inside else jax.jit(plan_rows)(pages.lengths, pages.k_pages)

    def call(q, shared, table):
        k_pages, v_pages, lengths, plan = shared
        if inside:
            # Nothing is added, but the compiler cannot know, and make one plan for all calls.
            lengths += jnp.isnan(q[0, 0, 0]).astype(lengths.dtype)
        return attend(*(q, k_pages, v_pages, table, lengths), scale=case.width**-0.5, plan=plan)

    shared = pages.k_pages, pages.v_pages, pages.lengths, plan
    return Contender(call, shared, pages.tables, case.live_bytes)


def _dense_xla(q, lengths, padded):
    k, v = padded  # [R, S, H]
    scores = jnp.einsum("RGH,RSH->RGS", q, k, preferred_element_type=jnp.float32)
    live = jnp.arange(k.shape[1]) < lengths[:, None, None]
    scores = jnp.where(live, q.shape[-1] ** -0.5 * scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("RGS,RSH->RGH", weights, v, preferred_element_type=jnp.float32).astype(
        q.dtype
    )


def _dense_cudnn(q, lengths, padded):
    k, v = (x[:, :, None] for x in padded)  # a row is a sequence with one KV head
    return jax.nn.dot_product_attention(
        q[:, None], k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, 0]


# ---- check, then time -------------------------------------------------------------------------


def check(out: jax.Array, case: Case, pages: Pages) -> float:
    """The greatest relative error of some rows, the longest and the shortest among them.

    Raises:
        Wrong: it exceeds `TOLERANCE`, or some row is not finite.
    """
    order = np.argsort(pages.lengths)
    rows = order[np.linspace(0, order.size - 1, min(_CHECKED_ROWS, order.size)).astype(int)]
    expected = reference.decode_attention(
        pages.q[rows],
        pages.k_pages,
        pages.v_pages,
        pages.tables[0][rows],
        pages.lengths[rows],
        case.width**-0.5,
    )
    expected, got = (np.asarray(x, np.float32) for x in (expected, out[rows]))
    error = np.linalg.norm(got - expected, axis=(1, 2))
    error = float((error / np.maximum(np.linalg.norm(expected, axis=(1, 2)), 1e-6)).max())
    # Not `error > TOLERANCE`: NaN must not pass.
    if not error <= TOLERANCE or not bool(jnp.isfinite(out).all()):
        raise Wrong(f"relative error {error:.3g}, expected at most {TOLERANCE:g} and finite rows")
    return error


def measure(contender: Contender, case: Case, pages: Pages, rate: float) -> dict:
    """Check and time one contender.

    Args:
        contender: to call.
        case: what it does.
        pages: of the case.
        rate: bytes a second of copying.

    Raises:
        Wrong: it is not right.
    """
    first, taken = timing.time_chain(
        contender.call,
        pages.q,
        contender.shared,
        contender.sets,
        expected=contender.read_bytes / rate,
    )
    useful = int(pages.lengths.sum()) * case.slot_bytes
    return {
        "relative_error": check(first, case, pages) if useful else None,
        "microseconds": round(1e6 * taken.median, 3),
        "least_and_greatest": [round(1e6 * x, 3) for x in (taken.least, taken.greatest)],
        "calls": taken.calls,
        "buffers": len(contender.sets),
        "useful_bytes": useful,
        "useful_bytes_per_second": useful / taken.median,
        "of_copy": round(useful / taken.median / rate, 4),
    }
