"""The kernel of attention over pages, compiled for A100 and H100/H200."""

import jax
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: nothing can be compiled")

from pallas_kernels.prefill_attention.settings import CANDIDATES, FLOAT32, settings_for  # noqa: E402
from pallas_kernels.prefill_attention.triton import attend, constants  # noqa: E402
from tests.pallas_kernels.compiled import compile_kernel  # noqa: E402

INTEGERS = ("slot_ptr", "table_ptr", "lengths_ptr", "seats_ptr", "sizes_ptr")


@pytest.fixture(autouse=True)
def compiled_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


USUAL = settings_for("no such device")


def compile_attend(
    settings, capability, *, N=32, K=32, H=128, page=16, dtype="bfloat16", pool=None
):
    q, own = (jax.ShapeDtypeStruct((1, 512, heads, H), dtype) for heads in (N, K))
    pages = jax.ShapeDtypeStruct((99, page, H), pool or dtype)
    fixed = constants(q, own, pages, H**-0.5, settings)
    dtypes = {name: dtype for name in attend.arg_names if name not in fixed}
    # Averages are float32.
    dtypes |= dict.fromkeys(INTEGERS, "int32") | {"own_v_ptr": "float32"}
    dtypes |= dict.fromkeys(("k_ptr", "v_ptr"), pool or dtype)
    return compile_kernel(
        attend,
        dtypes,
        fixed,
        warps=settings.warps,
        stages=settings.stages,
        capability=capability,
    )


@pytest.mark.parametrize(
    "K, H, page",
    [
        (32, 128, 16),
        pytest.param(8, 128, 16, marks=pytest.mark.slow),
        pytest.param(8, 64, 256, marks=pytest.mark.slow),
        pytest.param(8, 80, 64, marks=pytest.mark.slow),
    ],
)
def the_usual_settings_use_what_hopper_has_and_do_not_spill_test(K, H, page):
    usage = compile_attend(USUAL, 90, K=K, H=H, page=page)
    assert usage.spilled == 0
    assert usage.resident(USUAL.warps, 90) >= 2
    # Hopper's own matrix instruction, fed by 16-byte asynchronous copies.
    assert "wgmma.mma_async" in usage.ptx and "mma.sync" not in usage.ptx
    copies = [line for line in usage.ptx.splitlines() if "cp.async.c" in line]
    assert sum(", 0x10, " in line or ", 16, " in line for line in copies) >= 8


def pages_of_int8_do_not_spill_test():
    usage = compile_attend(USUAL, 90, pool="int8")
    assert usage.spilled == 0
    assert usage.resident(USUAL.warps, 90) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", CANDIDATES, ids=str)
def no_candidate_spills_on_hopper_test(settings):
    usage = compile_attend(settings, 90)
    assert usage.spilled == 0
    assert usage.resident(settings.warps, 90) >= 1


@pytest.mark.slow
def it_fits_an_a100_test():
    usage = compile_attend(USUAL, 80)
    assert usage.spilled <= 64
    assert usage.resident(USUAL.warps, 80) >= 1
    assert "mma.sync" in usage.ptx


@pytest.mark.slow
@pytest.mark.parametrize("H, page", [(80, 16), (128, 64)])
def float32_compiles_within_shared_memory_test(H, page):
    usage = compile_attend(FLOAT32, 90, H=H, page=page, dtype="float32")
    assert usage.resident(FLOAT32.warps, 90) >= 1
