"""Every variant of the Triton kernels in the tuning set, compiled for A100 and H100/H200."""

import jax
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: nothing can be compiled")

from pallas_kernels.decode_attention.api import Plan  # noqa: E402
from pallas_kernels.decode_attention.plan import WARPS, plan_constants, plan_layer  # noqa: E402
from pallas_kernels.decode_attention.settings import CANDIDATES, settings_for  # noqa: E402
from pallas_kernels.decode_attention.triton import (  # noqa: E402
    JOIN_WARPS,
    attend_constants,
    attend_items,
    join_constants,
    join_items,
    padded_width,
)
from tests.pallas_kernels.compiled import SHARED, compile_kernel  # noqa: E402

DEFAULT = settings_for("no such device")

# How many programs there are does not change the kernel.
VARIANTS = {(s.block_bytes, s.warps, s.stages): s for s in CANDIDATES}.values()

capabilities = pytest.mark.parametrize("capability", SHARED)


@pytest.fixture(autouse=True)
def compiled_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_attend(
    settings, capability, *, G=4, H=128, page=16, q="bfloat16", pool="bfloat16", massive=False
):
    queries, pages = jax.ShapeDtypeStruct((64, G, H), q), jax.ShapeDtypeStruct((99, page, H), pool)
    table = jax.ShapeDtypeStruct((2, 1024, 256), "int32")
    block = settings.block(padded_width(H), pages.dtype.itemsize)
    of_plan = ("row_ptr", "begin_ptr", "end_ptr", "of_program_ptr", "of_row_ptr")
    dtypes = dict.fromkeys(("table_ptr", "lengths_ptr", "at_ptr", *of_plan), "int32")
    dtypes |= dict.fromkeys(("factor_ptr", "partial_ptr", "lse_ptr", "gamma_ptr"), "float32")
    dtypes |= {"tokens_ptr": "uint16" if massive else "int32"}
    dtypes |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), q if pool == "int8" else "float32")
    return compile_kernel(
        attend_items,
        dtypes | {"q_ptr": q, "k_ptr": pool, "v_ptr": pool, "out_ptr": q},
        attend_constants(queries, pages, table, block, massive=massive),
        warps=settings.warps,
        stages=settings.stages,
        capability=capability,
    )


def assert_streams(usage):
    """Keys and values must go by 16-byte asynchronous copies, and nothing else of their size."""
    copies = [line for line in usage.ptx.splitlines() if "cp.async.c" in line]
    assert sum(", 0x10, " in line or ", 16, " in line for line in copies) >= 8
    assert "ldmatrix" in usage.ptx and "mma.sync" in usage.ptx


@pytest.mark.parametrize(
    "H, capability",
    [
        (128, 90),
        pytest.param(64, 90, marks=pytest.mark.slow),
        pytest.param(128, 80, marks=pytest.mark.slow),
        pytest.param(64, 80, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def no_variant_to_tune_spills_or_exceeds_shared_memory_test(settings, H, capability):
    usage = compile_attend(settings, capability, H=H)
    assert usage.spilled == 0
    assert usage.resident(settings.warps, capability) >= 1
    if capability == 90:  # the set is for this one
        assert usage.resident(settings.warps, capability) >= settings.programs_per_core
    assert_streams(usage)


@capabilities
@pytest.mark.parametrize("G, H, page", [(1, 64, 256), (8, 128, 16)])
def the_default_fits_as_many_programs_as_it_says_test(G, H, page, capability):
    assert DEFAULT.programs_per_core >= 2
    usage = compile_attend(DEFAULT, capability, G=G, H=H, page=page)
    assert usage.spilled == 0
    assert usage.resident(DEFAULT.warps, capability) >= DEFAULT.programs_per_core
    assert_streams(usage)


@capabilities
@pytest.mark.parametrize("H", [64, 128])
def slots_of_several_tokens_cost_no_program_its_place_test(H, capability):
    usage = compile_attend(DEFAULT, capability, H=H, massive=True)
    assert usage.spilled == 0
    assert usage.resident(DEFAULT.warps, capability) >= DEFAULT.programs_per_core
    assert_streams(usage)


@capabilities
@pytest.mark.parametrize("H", [64, 128])
def pages_of_int8_cost_no_program_its_place_test(H, capability):
    usage = compile_attend(DEFAULT, capability, H=H, pool="int8")
    assert usage.spilled == 0
    assert usage.resident(DEFAULT.warps, capability) >= DEFAULT.programs_per_core
    assert_streams(usage)


@pytest.mark.parametrize("G, H", [(32, 128), (4, 80)])
def unusual_sizes_do_not_spill_test(G, H):
    usage = compile_attend(DEFAULT, 90, G=G, H=H)
    assert usage.spilled == 0
    assert usage.resident(DEFAULT.warps, 90) >= 2


def float32_compiles_within_shared_memory_test():
    usage = compile_attend(DEFAULT, 90, q="float32", pool="float32")
    assert usage.resident(DEFAULT.warps, 90) >= 1


@capabilities
@pytest.mark.parametrize("R, G", [(4, 8), (2048, 1), (256, 8)])
def joining_items_takes_little_test(R, G, capability):
    q = jax.ShapeDtypeStruct((R, G, 128), "bfloat16")
    ends = [jax.ShapeDtypeStruct((n + 1,), "int32") for n in (2 * 132, R)]
    plan = Plan(None, None, None, *ends, block=64)
    dtypes = dict.fromkeys(("partial_ptr", "lse_ptr"), "float32")
    usage = compile_kernel(
        join_items,
        dtypes
        | dict.fromkeys(("of_row_ptr", "at_ptr"), "int32")
        | dict.fromkeys(("out_before", "out_ptr"), "bfloat16"),
        join_constants(q, plan),
        warps=JOIN_WARPS,
        stages=1,
        capability=capability,
    )
    assert usage.spilled == 0
    assert usage.resident(JOIN_WARPS, capability) >= 4


@capabilities
@pytest.mark.parametrize("R", [4, 8704])
def planning_spills_nothing_test(R, capability):
    constants = plan_constants(R, block=64, programs=3 * 132)
    dtypes = {name: "int32" for name in plan_layer.arg_names if name not in constants}
    usage = compile_kernel(
        plan_layer, dtypes, constants, warps=WARPS, stages=1, capability=capability
    )
    assert usage.spilled == 0
    assert usage.resident(WARPS, capability) >= 1


def a_spill_would_be_seen_test(monkeypatch):
    from tests.pallas_kernels import compiled

    monkeypatch.setattr(compiled, "_OPTIONS", compiled._OPTIONS | {"maxnreg": 40})
    assert compile_attend(DEFAULT, 90).spilled > 0
