"""Every variant of the attention kernels in the tuning set, compiled for A100 and H100/H200."""

import jax
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: nothing can be compiled")

from pallas_kernels.causal_attention.settings import (  # noqa: E402
    CANDIDATES,
    FLOAT32,
    settings_for,
)
from pallas_kernels.causal_attention.triton import (  # noqa: E402
    attend,
    constants,
    key_gradients,
    query_gradients,
)
from tests.pallas_kernels.compiled import compile_kernel  # noqa: E402

KERNELS = {
    "forward": attend,
    "key_gradients": key_gradients,
    "query_gradients": query_gradients,
}
DEFAULT = settings_for("no such device")
INTEGERS = ("starts_ptr", "ends_ptr")
WIDE = ("bias_ptr", "spared_ptr", "lse_ptr", "delta_ptr", "dbias_ptr", "dspared_ptr")


@pytest.fixture(autouse=True)
def compiled_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_attention(
    name, blocks, capability, *, T=4096, N=32, K=8, H=128, dtype="bfloat16", **ages
):
    kernel = KERNELS[name]
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K))
    fixed = constants(q, k, H**-0.5, blocks, **ages)
    if name != "forward":
        fixed |= {"SCALE": H**-0.5}
    dtypes = {name: dtype for name in kernel.arg_names if name not in fixed}
    dtypes |= {name: "int32" for name in INTEGERS if name in dtypes}
    dtypes |= {name: "float32" for name in WIDE if name in dtypes}
    return compile_kernel(
        kernel, dtypes, fixed, warps=blocks.warps, stages=blocks.stages, capability=capability
    )


def assert_multiplies_by_warpgroups_from_shared_memory(usage):
    """Hopper's own matrix instruction, fed by 16-byte asynchronous copies."""
    assert "wgmma.mma_async" in usage.ptx and "mma.sync" not in usage.ptx
    assert "cp.async.c" in usage.ptx


@pytest.mark.parametrize(
    "name, blocks", [(name, blocks) for name in KERNELS for blocks in [vars(DEFAULT)[name]]]
)
def the_default_uses_what_hopper_has_and_does_not_spill_test(name, blocks):
    usage = compile_attention(name, blocks, 90)
    assert usage.spilled == 0
    assert usage.resident(blocks.warps, 90) >= 1
    assert_multiplies_by_warpgroups_from_shared_memory(usage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ages", [{"until": 16}, {"first": 16, "spared": 17, "other": True}], ids=["raw", "states"]
)
@pytest.mark.parametrize("name", KERNELS)
def keys_of_some_ages_spill_nothing_on_hopper_test(name, ages):
    blocks = vars(DEFAULT)[name]
    usage = compile_attention(name, blocks, 90, **ages)
    assert usage.spilled == 0
    assert_multiplies_by_warpgroups_from_shared_memory(usage)


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize(
    "name, blocks", [(name, blocks) for name in KERNELS for blocks in CANDIDATES[name]], ids=str
)
def no_variant_to_tune_spills_on_hopper_test(name, blocks, H):
    usage = compile_attention(name, blocks, 90, H=H)
    assert usage.spilled == 0
    assert usage.resident(blocks.warps, 90) >= 1
    assert_multiplies_by_warpgroups_from_shared_memory(usage)


@pytest.mark.parametrize(
    "name", ["forward", *(pytest.param(x, marks=pytest.mark.slow) for x in list(KERNELS)[1:])]
)
def the_default_fits_an_a100_test(name):
    """It is made for Hopper: a few registers may spill here."""
    blocks = vars(DEFAULT)[name]
    usage = compile_attention(name, blocks, 80)
    assert usage.spilled <= 64
    assert usage.resident(blocks.warps, 80) >= 1
    assert "mma.sync" in usage.ptx


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("H, T", [(80, 1000), (128, 4096)])
def float32_and_odd_sizes_compile_within_shared_memory_test(name, H, T):
    blocks = vars(FLOAT32)[name]
    usage = compile_attention(name, blocks, 90, H=H, T=T, dtype="float32")
    assert usage.resident(blocks.warps, 90) >= 1
