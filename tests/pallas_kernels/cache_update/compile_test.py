"""The kernel of the cache update, compiled for A100 and H100/H200, and lowered with the engine."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import decoding
from dmc_jax.policies.dmc import DMC
from pallas_kernels.cache_update import api

triton = pytest.importorskip("triton", reason="triton is not installed: nothing can be compiled")

from pallas_kernels.cache_update.settings import SETTINGS  # noqa: E402
from pallas_kernels.cache_update.triton import (  # noqa: E402
    update_constants,
    update_rows,
    warps_for,
)
from tests.pallas_kernels.compiled import SHARED, compile_kernel  # noqa: E402
from tests.pallas_kernels.lowered import (  # noqa: E402
    CONFIG,
    PAGE,
    PAGES,
    SEATS,
    on,
    shapes_of_a_step,
)

capabilities = pytest.mark.parametrize("capability", SHARED)

# Of a Llama head and the usual window. A row has some 4 KiB on their way, and a multiprocessor
# needs 36 KiB to keep the memory busy (see `decode_attention.settings`).
_ROWS_PER_CORE = 12


@pytest.fixture(autouse=True)
def compiled_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_update(
    capability, *, H=128, window=12, G=1, merges=True, pages="bfloat16", tokens="bfloat16"
):
    """What the kernel takes, and warps per program."""

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    of_ring = tokens if window else "float32"
    pool, ring = array(9999, 64, H, dtype=pages), array(64, 1024, window or 1, H, dtype=of_ring)
    scales = [array(*pool.shape[:2], dtype=tokens)] * 2 if pages == "int8" else []
    count = array(64, 1024, dtype="int32")
    segment = api.Segment(ring, ring, array(*ring.shape[:3]), count)
    state = api.State(pool, pool, count, segment if merges else None, *scales)
    constants = {"OFFSET": 5.0, "EPS": 2**-7}
    constants |= update_constants(
        state, array(64, 32 * G, H), array(64, 32, H), not window, SETTINGS
    )
    dtypes = {name: "float32" for name in update_rows.arg_names if name not in constants}
    changed = ("k_pages", "v_pages"), ("lengths", "count"), ("keys", "values") if merges else ()
    for names, dtype in zip(changed, (pages, "int32", of_ring), strict=True):
        dtypes |= {f"{name}_{end}": dtype for name in names for end in ("before", "ptr")}
    if not merges:
        dtypes |= dict.fromkeys(("count_before", "count_ptr"), "float32")
    dtypes |= dict.fromkeys(("token_ptr", "rotated_ptr"), tokens)
    if pages == "int8":
        scale_names = [f"{x}_scale_{end}" for x in "kv" for end in ("before", "ptr")]
        dtypes |= dict.fromkeys(scale_names, tokens)
    dtypes |= dict.fromkeys(("table_ptr", "active_ptr", "at_ptr"), "int32")
    warps = warps_for(constants, SETTINGS)
    usage = compile_kernel(
        update_rows, dtypes, constants, warps=warps, stages=1, capability=capability
    )
    return usage, warps


@capabilities
@pytest.mark.parametrize("pages, tokens", [("bfloat16", "bfloat16"), ("float32", "float32")])
def a_row_of_the_usual_size_is_one_warp_test(capability, pages, tokens):
    usage, warps = compile_update(capability, pages=pages, tokens=tokens)
    assert warps == 1
    # Threads that have channels in common, of a ring in bfloat16, add up no more than one head.
    assert usage.spilled == 0
    assert usage.shared <= (256 if tokens == "bfloat16" else 0)
    assert usage.resident(warps, capability) >= _ROWS_PER_CORE
    # The rings go by 16 bytes, and only what the masks let through.
    wide = [line for line in usage.ptx.splitlines() if "ld.global.v4.b32" in line]
    assert len(wide) >= 2 * 16 * jnp.dtype(tokens).itemsize // 4
    assert all(line.strip().startswith("@%p") for line in wide)


@capabilities
@pytest.mark.parametrize("merges", [True, False])
def pages_of_int8_take_little_more_test(capability, merges):
    usage, warps = compile_update(capability, pages="int8", merges=merges)
    assert usage.spilled == 0
    assert usage.resident(warps, capability) >= _ROWS_PER_CORE


@pytest.mark.parametrize("H, window", [(64, 12), (80, 12), (128, None), (256, 16), (128, 100)])
@pytest.mark.parametrize("G, merges", [(1, True), (8, True), (4, False)])
def other_sizes_do_not_spill_test(H, window, G, merges):
    usage, warps = compile_update(90, H=H, window=window, G=G, merges=merges)
    assert usage.spilled == 0
    assert usage.resident(warps, 90) >= 4


# ---- the engine with it -------------------------------------------------------------------------


def lowered_step():
    """Text of a decoding step with a donated cache."""
    params, cache, tokens, active = shapes_of_a_step()
    step = functools.partial(
        decoding.decode_step,
        config=CONFIG,
        policy=DMC(DMCSettings()),
        dtype="bfloat16",
        implementation="xla",
        update="triton",
    )
    with on("NVIDIA H200"):
        reason = api.unavailable("triton")
        if reason is not None:
            pytest.skip(reason)
        step = jax.jit(step, donate_argnames="cache")
        traced = step.trace(params, cache=cache, tokens=tokens, active=active)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def a_decoding_step_calls_one_kernel_a_layer_that_changes_the_cache_in_place_test(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or Triton 3.9 warns that 3.10 changes it
    text = lowered_step()
    calls = re.findall(r".*custom_call @triton_kernel_call_ffi\(.*", text)
    assert len(calls) == len(re.findall(r"call @_update\w*\(", text)) == CONFIG.layers
    ring = f"{SEATS}x{CONFIG.kv_rows}x12x64xbf16"
    for call in calls:
        aliases = re.findall(
            r"output_operand_alias<output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", call
        )
        assert aliases == [(str(i + 1), str(i)) for i in range(7)]
        results = call[call.rindex("->") :]
        assert results.count(f"tensor<{PAGES}x{PAGE}x64xbf16>") == 2
        assert results.count(f"tensor<{ring}>") == 2
    # Nothing else makes a new ring: all slices of it would be smaller.
    assert not re.findall(rf"dynamic_update_slice.*-> tensor<{ring}>", text)
