"""Every implementation against the reference; the reference against numbers worked out by hand.

Without a GPU or TPU, its implementations run interpreted (see conftest), all through the same
interface.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.decode_attention.api import (
    IMPLEMENTATIONS,
    Plan,
    choose,
    decode_attention,
    decode_attention_and_weights,
    plan_decode_attention,
)
from pallas_kernels.decode_attention.settings import CANDIDATES
from pallas_kernels.decode_attention.workloads import (
    CORRECTNESS,
    Workload,
    make_inputs,
    ragged_lengths,
)
from pallas_kernels.implementations import Implementations
from pallas_kernels.quantisation import quantise
from tests.pallas_kernels.interpreted import GPU, TPU

# Relative and absolute. Both sides compute in float32, so bfloat16 only rounds the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

FAST = [name for name in IMPLEMENTATIONS.names if name != "reference"]
PLANNED = ["triton"]
RAGGED = CORRECTNESS[0]

# Each is compiled or interpreted for seconds. The others, too, have every G, dtype and page, and
# every H but 32, which is that of most of the smaller tests.
SLOW = {
    *("one_long-G4-H64-page16-float32", "one_long-G1-H32-page64-float32"),
    *("ragged-G8-H32-page8-float32", "boundaries-G8-H64-page64-float32"),
    *("many_short-G1-H32-page16-float32", "boundaries-G4-H32-page8-float32"),
}

# Interpreting a TPU takes a second a test, whatever the size.
QUICK_ON_TPU = {
    *("boundaries-G8-H64-page64-float32", "boundaries-G4-H64-page32-bfloat16"),
    "roomy_table-G4-H64-page8-float32",
}

every_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "tpu" else [])
        for name in IMPLEMENTATIONS.names
    ],
)
without_a_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")


@functools.cache
def inputs_of(workload):
    return make_inputs(workload)


@functools.cache
def expected_of(workload):
    scale = workload.width**-0.5
    return decode_attention(*inputs_of(workload), scale=scale, implementation="reference")


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[str(expected.dtype)]
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the meaning, by hand -----------------------------------------------------------------------


def numbered_pages(pages, page, width=4):
    """Values that name their place: slot i of page p holds 100 p + i."""
    places = 100.0 * jnp.arange(pages)[:, None] + jnp.arange(page)
    return jnp.broadcast_to(places[..., None], (pages, page, width))


@every_implementation
def equal_scores_give_the_mean_of_the_live_values_test(implementation):
    values = numbered_pages(4, 8)
    table = jnp.array([[3, 1], [0, 2], [2, 0]], jnp.int32)
    out = decode_attention(
        jnp.zeros((3, 2, 4)),
        jnp.ones((4, 8, 4)),
        values,
        table,
        jnp.array([10, 3, 0], jnp.int32),
        scale=1.0,
        implementation=implementation,
    )
    # Row 0: slots 300..307, 100, 101. Row 1: slots 0, 1, 2. Row 2: none.
    np.testing.assert_allclose(out[0], (sum(range(300, 308)) + 100 + 101) / 10, rtol=1e-6)
    np.testing.assert_allclose(out[1], 1.0, rtol=1e-6)
    assert np.all(out[2] == 0)


@every_implementation
def scores_are_dot_products_times_the_scale_test(implementation):
    # Scores 0 and log 3: weights 1/4 and 3/4. The second query's score is negated: 3/4 and 1/4.
    keys = jnp.zeros((1, 8, 4)).at[0, 1, 2].set(2.0)
    values = jnp.zeros((1, 8, 4)).at[0, 0].set(4.0).at[0, 1].set(8.0)
    q = jnp.zeros((1, 2, 4)).at[0, :, 2].set(jnp.array([0.5, -0.5]) * np.log(3.0))
    out = decode_attention(
        *(q, keys, values, jnp.zeros((1, 1), jnp.int32), jnp.array([2], jnp.int32)),
        scale=1.0,
        implementation=implementation,
    )
    np.testing.assert_allclose(out[0, 0], 7.0, rtol=1e-6)
    np.testing.assert_allclose(out[0, 1], 5.0, rtol=1e-6)
    halved = decode_attention(
        *(2 * q, keys, values, jnp.zeros((1, 1), jnp.int32), jnp.array([2], jnp.int32)),
        scale=0.5,
        implementation=implementation,
    )
    np.testing.assert_allclose(halved, out, rtol=1e-6)


@every_implementation
def huge_scores_do_not_overflow_test(implementation):
    inputs = make_inputs(Workload("huge", (70, 3), 2, 32, 8))
    out = decode_attention(inputs.q * 1e3, *inputs[1:], scale=1e3, implementation=implementation)
    assert np.all(np.isfinite(out))


# ---- every implementation against the reference -------------------------------------------------


def is_slow(name, workload):
    return str(workload) not in QUICK_ON_TPU if name == "tpu" else str(workload) in SLOW


@pytest.mark.parametrize(
    "implementation, workload",
    [
        pytest.param(
            *(name, workload),
            id=f"{name}-{workload}",
            marks=[pytest.mark.slow] if is_slow(name, workload) else [],
        )
        for name in FAST
        for workload in CORRECTNESS
    ],
)
def output_equals_the_reference_test(implementation, workload):
    # Pages are shuffled and all that is unused is NaN: a stray read would show.
    actual = decode_attention(
        *inputs_of(workload), scale=workload.width**-0.5, implementation=implementation
    )
    expected = expected_of(workload)
    assert np.all(np.isfinite(expected))
    assert_close(actual, expected)


def the_workloads_cover_the_contract_test():
    assert {str(w) for w in CORRECTNESS} >= SLOW
    fast = [w for w in CORRECTNESS if str(w) not in SLOW]
    for workloads, widths in ((CORRECTNESS, {32, 64, 128}), (fast, {64, 128})):
        assert {w.page for w in workloads} >= {8, 16, 32, 64}
        assert {w.queries for w in workloads} >= {1, 4, 8}
        assert {w.width for w in workloads} >= widths
        assert {w.dtype for w in workloads} == {"float32", "bfloat16"}


@every_implementation
def rows_of_length_zero_give_zeros_test(implementation):
    workload = Workload("holes", (0, 30, 0, 0, 200, 0), 4, 32, 16)
    out = decode_attention(*inputs_of(workload), scale=0.2, implementation=implementation)
    empty = np.array(workload.lengths) == 0
    assert np.all(out[empty] == 0)
    assert np.all(np.any(out[~empty] != 0, axis=-1))


@every_implementation
def float32_queries_may_meet_a_bfloat16_pool_test(implementation):
    inputs = inputs_of(Workload("mixed", (100, 17), 4, 32, 16, dtype="bfloat16"))
    q = inputs.q.astype(jnp.float32)
    out = decode_attention(q, *inputs[1:], scale=0.2, implementation=implementation)
    k, v = (x.astype(jnp.float32) for x in inputs[1:3])
    expected = decode_attention(q, k, v, *inputs[3:], scale=0.2, implementation="reference")
    assert_close(out, expected)


@every_implementation
def a_nan_in_a_live_slot_stays_in_its_row_test(implementation):
    inputs = inputs_of(Workload("live_nan", (100, 200, 3, 40), 4, 32, 16))
    poisoned = inputs.v_pages.at[inputs.page_table[1, 0], 0].set(jnp.nan)
    attend = functools.partial(decode_attention, scale=0.2, implementation=implementation)
    out = attend(inputs.q, inputs.k_pages, poisoned, *inputs[3:])
    assert np.all(np.isnan(out[1]))
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(out[others], attend(*inputs)[others])


@every_implementation
def permuting_the_pool_changes_nothing_test(implementation):
    inputs = inputs_of(RAGGED)
    pages = inputs.k_pages.shape[0]
    order = jax.random.permutation(jax.random.key(1), pages)
    table = jnp.argsort(order)[jnp.clip(inputs.page_table, 0, pages - 1)]
    attend = functools.partial(decode_attention, scale=0.125, implementation=implementation)
    moved = attend(inputs.q, inputs.k_pages[order], inputs.v_pages[order], table, inputs.lengths)
    np.testing.assert_array_equal(moved, attend(*inputs))


@every_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
def the_same_inputs_give_the_same_bits_test(implementation, dtype):
    workload = Workload("again", ragged_lengths(20, mean=150, longest=600), 2, 64, 16, dtype)
    attend = functools.partial(decode_attention, scale=0.125, implementation=implementation)
    first, second = (np.asarray(attend(*inputs_of(workload))).tobytes() for _ in range(2))
    assert first == second


@every_implementation
def one_compilation_serves_every_length_test(implementation):
    traced = []

    @jax.jit
    def attend(*inputs):
        traced.append(None)
        return decode_attention(*inputs, scale=0.2, implementation=implementation)

    inputs = inputs_of(Workload("growing", (200, 200, 200), 4, 32, 16))
    for lengths in ([200, 200, 200], [0, 1, 130], [0, 0, 0]):
        inputs = inputs._replace(lengths=jnp.array(lengths, jnp.int32))
        expected = decode_attention(*inputs, scale=0.2, implementation="reference")
        assert_close(attend(*inputs), expected)
    assert len(traced) == 1


@every_implementation
def lengths_beyond_the_table_count_as_full_test(implementation):
    inputs = inputs_of(Workload("full", (64, 64), 1, 32, 16))
    attend = functools.partial(decode_attention, scale=0.2, implementation=implementation)
    wild = inputs._replace(lengths=jnp.array([1000, -5], jnp.int32))
    full = inputs._replace(lengths=jnp.array([64, 0], jnp.int32))
    np.testing.assert_array_equal(attend(*wild), attend(*full))


@pytest.mark.parametrize("dtype", [*TOLERANCE, "int8"])
def temporaries_do_not_grow_with_the_pool_test(dtype):
    queries = "float32" if dtype == "int8" else dtype

    def temporary_bytes(pages):
        shapes = [
            jax.ShapeDtypeStruct(shape, kind)
            for shape, kind in (
                ((32, 4, 64), queries),
                ((pages, 16, 64), dtype),
                ((pages, 16, 64), dtype),
                ((32, 64), "int32"),
                ((32,), "int32"),
            )
        ]
        scales = {}
        if dtype == "int8":
            of_slots = jax.ShapeDtypeStruct((pages, 16), queries)
            scales = dict.fromkeys(("k_scale", "v_scale"), of_slots)
        attend = functools.partial(decode_attention, scale=0.125, implementation="xla")
        program = jax.jit(attend).lower(*shapes, **scales).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2_000), temporary_bytes(200_000)
    assert large <= small + 4096


@without_a_gpu
def no_name_takes_the_fastest_implementation_of_a_cpu_test():
    attend = functools.partial(decode_attention, *inputs_of(RAGGED), scale=0.125)
    np.testing.assert_array_equal(attend(), attend(implementation="xla"))


# ---- plans made ahead ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLANNED)
def a_plan_made_ahead_for_longer_rows_changes_nothing_test(implementation):
    workload = Workload("ahead", (0, 15, 16, 128, 127, 256), 2, 32, 16, longest=300)
    inputs = inputs_of(workload)
    attend = functools.partial(decode_attention, scale=0.2, implementation=implementation)
    plan = plan_decode_attention(
        inputs.lengths + 1, inputs.k_pages, longest=304, implementation=implementation
    )
    expected = decode_attention(*inputs, scale=0.2, implementation="reference")
    assert_close(attend(*inputs, plan=plan), expected)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PLANNED)
@pytest.mark.parametrize("settings", CANDIDATES, ids=str)
def settings_to_tune_from_change_nothing_but_rounding_test(implementation, settings):
    module = IMPLEMENTATIONS.load(implementation)
    *others, table, lengths = inputs_of(RAGGED)
    rows = table[None], lengths[None]
    out = module.decode_attention(*others, *rows, RAGGED.width**-0.5, settings=settings)
    assert_close(out, expected_of(RAGGED))


@pytest.mark.parametrize("implementation", PLANNED)
def layers_may_be_planned_at_once_test(implementation):
    inputs = inputs_of(Workload("layers", (100, 3, 40), 2, 32, 16))
    lengths = jnp.stack([inputs.lengths, inputs.lengths // 2])
    plans = plan_decode_attention(
        lengths, inputs.k_pages, longest=112, implementation=implementation
    )
    attend = functools.partial(decode_attention, scale=0.2, implementation=implementation)
    for layer in range(2):
        now = inputs._replace(lengths=lengths[layer])
        plan = dataclasses.replace(plans, layer=layer)
        np.testing.assert_array_equal(attend(*now, plan=plan), attend(*now))


@every_implementation
@pytest.mark.parametrize("planned", [False, True])
def rows_of_a_layer_are_found_among_those_of_all_layers_test(implementation, planned):
    """Two sequences of five rows each; the layer has the third and the fourth."""
    rows = (100, 3, 0, 40, 70, 8, 16, 33, 5, 64)
    inputs = inputs_of(Workload("of_layers", rows, 2, 32, 8))
    of_layer = np.array([2, 3, 7, 8])
    q = inputs.q[of_layer]
    whole = inputs.page_table.reshape(2, 5, -1), inputs.lengths.reshape(2, 5)
    cut = inputs.page_table[of_layer], inputs.lengths[of_layer]
    options = {"scale": 0.2, "implementation": implementation}
    plan = None
    if planned:
        if implementation not in PLANNED:
            pytest.skip("it works without a plan")
        lengths = jnp.stack([inputs.lengths[:4] + 1, cut[1] + 1])
        plans = plan_decode_attention(
            lengths, inputs.k_pages, longest=104, implementation=implementation
        )
        plan = dataclasses.replace(plans, layer=1)
    pool = inputs.k_pages, inputs.v_pages
    out = decode_attention(q, *pool, *whole, **options, first=2, plan=plan)
    assert_close(out, decode_attention(q, *pool, *cut, scale=0.2, implementation="reference"))


@pytest.mark.usefixtures("annotations_aside")
def rows_that_sequences_cannot_share_are_refused_test():
    inputs = inputs_of(Workload("layers", (100, 3, 40), 2, 32, 16))
    whole = jnp.zeros((2, 5, 7), jnp.int32), jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="as many rows of each of the 2 sequences, .* 3 in all"):
        decode_attention(*inputs[:3], *whole, scale=0.2)


@pytest.mark.parametrize("implementation", PLANNED)
def a_plan_for_other_rows_is_refused_test(implementation):
    inputs = inputs_of(Workload("other", (100, 3, 40), 2, 32, 16))
    plan = plan_decode_attention(
        jnp.array([100, 3], jnp.int32), inputs.k_pages, longest=112, implementation=implementation
    )
    with pytest.raises(ValueError, match=r"the plan must be for R = 3 rows as in q, .*\(3,\)"):
        decode_attention(*inputs, scale=0.2, implementation=implementation, plan=plan)


GIVE_WEIGHTS = ("reference", "xla")


@pytest.mark.parametrize("workload", [RAGGED, Workload("holes", (0, 30, 200), 4, 32, 8)], ids=str)
@pytest.mark.parametrize("implementation", GIVE_WEIGHTS)
def weights_are_a_softmax_over_the_live_slots_and_make_the_output_test(implementation, workload):
    inputs = inputs_of(workload)
    out, weights = decode_attention_and_weights(*inputs, scale=0.2, implementation=implementation)
    assert_close(out, decode_attention(*inputs, scale=0.2, implementation="reference"))
    weights = np.asarray(weights, np.float64)
    assert weights.shape == (*out.shape[:2], inputs.page_table.shape[1] * workload.page)
    for row, length in enumerate(workload.lengths):
        pages = np.asarray(inputs.page_table[row, : -(-length // workload.page)])
        keys = np.asarray(inputs.k_pages, np.float64)[pages].reshape(-1, workload.width)[:length]
        scores = np.exp(0.2 * np.asarray(inputs.q[row], np.float64) @ keys.T)
        expected = scores / scores.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(weights[row, :, :length], expected, atol=1e-5)
        assert (weights[row, :, length:] == 0).all()


def an_implementation_that_cannot_give_the_weights_says_so_test(monkeypatch):
    module = importlib.import_module("pallas_kernels.decode_attention.xla")
    monkeypatch.delattr(module, "decode_attention_and_weights")
    with pytest.raises(ValueError, match="'xla' of decode_attention cannot give the weights"):
        decode_attention_and_weights(*inputs_of(RAGGED), scale=0.2, implementation="xla")


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def an_implementation_without_plans_makes_none_and_takes_none_test(implementation):
    inputs = inputs_of(Workload("planless", (100, 3, 40), 2, 32, 16))
    options = {"longest": 112, "implementation": implementation}
    assert plan_decode_attention(inputs.lengths, inputs.k_pages, **options) is None
    plan = Plan(*[jnp.zeros(4, jnp.int32)] * 5, block=16)
    with pytest.raises(ValueError, match=f"'{implementation}' .* works without a plan"):
        decode_attention(*inputs, scale=0.2, implementation=implementation, plan=plan)


# ---- slots of several tokens --------------------------------------------------------------------


def mass_of(inputs, seed=4):
    """Tokens of every slot, 0 where nobody reads; and gamma of every row, some of it 0."""
    rng = np.random.default_rng(seed)
    live = np.isfinite(np.asarray(inputs.k_pages, np.float32)).all(axis=-1)
    tokens = np.where(live, rng.choice([1, 2, 12, 2**16 - 1], live.shape), 0)
    gamma = np.where(np.arange(len(inputs.q)) % 3, rng.normal(size=len(inputs.q)), 0)
    return {"tokens": jnp.asarray(tokens, jnp.uint16), "gamma": jnp.asarray(gamma, jnp.float32)}


@every_implementation
def gamma_of_one_weighs_a_slot_like_all_its_tokens_test(implementation):
    """Two slots of equal scores, with one token and with three: weights 1/4 and 3/4."""
    values = jnp.zeros((1, 8, 4)).at[0, 0].set(4.0).at[0, 1].set(8.0)
    arrays = jnp.zeros((1, 2, 4)), jnp.zeros((1, 8, 4)), values, jnp.zeros((1, 1), jnp.int32)
    attend = functools.partial(
        *(decode_attention, *arrays, jnp.array([2], jnp.int32)),
        scale=1.0,
        implementation=implementation,
        tokens=jnp.zeros((1, 8), jnp.uint16).at[0, :2].set(jnp.array([1, 3], jnp.uint16)),
    )
    np.testing.assert_allclose(attend(gamma=jnp.ones(1))[0], 7.0, rtol=1e-6)
    np.testing.assert_allclose(attend(gamma=-jnp.ones(1))[0], 5.0, rtol=1e-6)


@every_implementation
@pytest.mark.parametrize(
    "workload",
    [
        Workload("counted", (0, 1, 70, 300, 16, 33), 2, 32, 16),
        Workload("counted", (40, 0, 500), 4, 64, 8, dtype="bfloat16"),
    ],
    ids=str,
)
def gamma_times_the_logarithm_of_tokens_is_added_to_scores_test(implementation, workload):
    """One more channel says it too: gamma of queries, log tokens of keys."""
    inputs = inputs_of(workload)
    mass = mass_of(inputs)
    options = {"scale": 0.2, "implementation": implementation}
    actual = decode_attention(*inputs, **options, **mass)
    more = jnp.log(mass["tokens"].astype(jnp.float32))
    q, k, v = (x.astype(jnp.float32) for x in inputs[:3])
    added = jnp.broadcast_to(mass["gamma"][:, None, None] / 0.2, (*q.shape[:2], 1))
    wide = (
        jnp.concatenate([q, added], axis=-1),
        jnp.concatenate([k, more[..., None]], axis=-1),
        jnp.pad(v, [(0, 0), (0, 0), (0, 1)]),
    )
    expected = decode_attention(*wide, *inputs[3:], scale=0.2, implementation="reference")
    assert_close(actual, expected[..., :-1].astype(actual.dtype))
    without = decode_attention(*inputs, **options)
    assert np.abs(np.asarray(actual - without, np.float32)).max() > 0.1
    nothing = mass | {"gamma": jnp.zeros_like(mass["gamma"])}
    assert_close(decode_attention(*inputs, **options, **nothing), without)


@pytest.mark.parametrize("implementation", PLANNED)
def slots_of_several_tokens_are_found_by_a_plan_for_all_layers_test(implementation):
    rows = (100, 3, 0, 40, 70, 8, 16, 33, 5, 64)
    inputs = inputs_of(Workload("of_layers", rows, 2, 32, 8))
    of_layer = np.array([2, 3, 7, 8])
    mass = mass_of(inputs)
    mass["gamma"] = mass["gamma"][of_layer]
    whole = inputs.page_table.reshape(2, 5, -1), inputs.lengths.reshape(2, 5)
    cut = inputs.page_table[of_layer], inputs.lengths[of_layer]
    plan = plan_decode_attention(
        cut[1] + 1, inputs.k_pages, longest=104, implementation=implementation
    )
    arrays = inputs.q[of_layer], inputs.k_pages, inputs.v_pages
    out = decode_attention(
        *(*arrays, *whole), scale=0.2, implementation=implementation, first=2, plan=plan, **mass
    )
    expected = decode_attention(*arrays, *cut, scale=0.2, implementation="reference", **mass)
    assert_close(out, expected)


def tokens_without_gamma_are_refused_test():
    inputs = inputs_of(RAGGED)
    with pytest.raises(ValueError, match="tokens and gamma go together"):
        decode_attention(*inputs, scale=0.2, tokens=mass_of(inputs)["tokens"])


# ---- pages of int8 ------------------------------------------------------------------------------


def in_int8(inputs, dtype="float32"):
    """The same pages quantised, their scales, and the inputs that these stand for.

    What nobody reads stays poison: a scale of NaN, and the largest of numbers.
    """
    scales, pools, stands_for = {}, {}, {}
    for name in "kv":
        pool = getattr(inputs, f"{name}_pages")
        dead = jnp.isnan(pool.astype(jnp.float32)).any(axis=-1)
        steps, scale = quantise(pool, dtype)
        pools[f"{name}_pages"] = jnp.where(dead[..., None], 127, steps).astype(jnp.int8)
        scales[f"{name}_scale"] = jnp.where(dead, jnp.nan, scale)
        wide = scale.astype(jnp.float32)
        stands_for[f"{name}_pages"] = jnp.where(dead, jnp.nan, wide)[..., None] * steps
    return inputs._replace(**pools), scales, inputs._replace(**stands_for)


READ_INT8 = pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])


@READ_INT8
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "workload",
    [
        Workload("int8", (0, 1, 70, 300, 16, 33), 2, 32, 16),
        Workload("int8", (40, 0, 500), 4, 64, 8, dtype="bfloat16"),
    ],
    ids=str,
)
def pages_of_int8_are_attended_to_as_what_they_stand_for_test(implementation, workload, counted):
    inputs = inputs_of(workload)
    narrow, scales, wide = in_int8(inputs, workload.dtype)
    mass = mass_of(inputs) if counted else {}
    out = decode_attention(*narrow, scale=0.2, implementation=implementation, **scales, **mass)
    expected = decode_attention(*wide, scale=0.2, implementation="reference", **mass)
    assert_close(out, expected)
    exact = decode_attention(*inputs, scale=0.2, implementation="reference", **mass)
    off = np.abs(np.asarray(expected, np.float32) - np.asarray(exact, np.float32)).max()
    assert 1e-4 < off < 0.03


@READ_INT8
def a_slot_of_a_large_scale_counts_for_what_it_is_test(implementation):
    """Keys 0 and log 3, values 4 and 8, as multiples of scales that differ by a thousand."""
    keys = jnp.zeros((1, 8, 4), jnp.int8).at[0, 1, 2].set(100)
    values = jnp.zeros((1, 8, 4), jnp.int8).at[0, 0].set(4).at[0, 1].set(80)
    out = decode_attention(
        jnp.zeros((1, 1, 4)).at[0, 0, 2].set(1.0),
        *(keys, values, jnp.zeros((1, 1), jnp.int32), jnp.array([2], jnp.int32)),
        scale=1.0,
        implementation=implementation,
        k_scale=jnp.full((1, 8), jnp.nan).at[0, :2].set(jnp.array([9.0, np.log(3.0) / 100])),
        v_scale=jnp.full((1, 8), jnp.nan).at[0, :2].set(jnp.array([100.0, 0.1])),
    )
    np.testing.assert_allclose(out[0, 0], 400 / 4 + 8 * 3 / 4, rtol=1e-6)


@pytest.mark.parametrize("implementation", GIVE_WEIGHTS)
def weights_over_pages_of_int8_are_those_over_what_they_stand_for_test(implementation):
    narrow, scales, wide = in_int8(inputs_of(Workload("holes", (0, 30, 200), 4, 32, 8)))
    found = decode_attention_and_weights(
        *narrow, scale=0.2, implementation=implementation, **scales
    )
    expected = decode_attention_and_weights(*wide, scale=0.2, implementation="reference")
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("implementation", PLANNED)
def pages_of_int8_are_found_by_a_plan_for_all_layers_test(implementation):
    rows = (100, 3, 0, 40, 70, 8, 16, 33, 5, 64)
    narrow, scales, wide = in_int8(inputs_of(Workload("of_layers", rows, 2, 32, 8)))
    of_layer = np.array([2, 3, 7, 8])
    whole = narrow.page_table.reshape(2, 5, -1), narrow.lengths.reshape(2, 5)
    cut = narrow.page_table[of_layer], narrow.lengths[of_layer]
    plan = plan_decode_attention(
        cut[1] + 1, narrow.k_pages, longest=104, implementation=implementation
    )
    options = {"scale": 0.2, "implementation": implementation, "first": 2, "plan": plan}
    out = decode_attention(narrow.q[of_layer], *narrow[1:3], *whole, **options, **scales)
    expected = decode_attention(
        wide.q[of_layer], *wide[1:3], *cut, scale=0.2, implementation="reference"
    )
    assert_close(out, expected)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def a_tpu_kernel_says_that_it_does_not_read_int8_test(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: TPU)
    narrow, scales, _ = in_int8(inputs_of(Workload("int8", (3, 5), 1, 32, 16)))
    with pytest.raises(ValueError, match="'tpu' .* does not read pages of int8: take 'xla'"):
        decode_attention(*narrow, scale=0.2, implementation="tpu", **scales)


def scales_go_with_int8_and_with_nothing_else_test():
    inputs = inputs_of(Workload("int8", (3, 5), 1, 32, 16))
    narrow, scales, _ = in_int8(inputs)
    for pages, given in (
        (inputs, scales),
        (narrow, {}),
        (narrow, {"k_scale": scales["k_scale"]}),
    ):
        with pytest.raises(ValueError, match="k_scale and v_scale go with pages of int8, and"):
            decode_attention(*pages, scale=0.2, **given)


@pytest.mark.usefixtures("annotations_aside")
def scales_that_break_the_contract_are_named_test():
    narrow, scales, _ = in_int8(inputs_of(Workload("int8", (3, 5), 1, 32, 16)))
    for change, message in (
        (lambda x: x[1:], r"k_scale must be \[P page\] with P = \d as in k_pages"),
        (lambda x: x.astype(jnp.float16), "k_scale must be float32 or bfloat16, got float16"),
    ):
        changed = scales | {"k_scale": change(scales["k_scale"])}
        with pytest.raises(ValueError, match=message):
            decode_attention(*narrow, scale=0.2, **changed)


# ---- workloads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, longest", [(512, 4096), (1024, 4096), (1, 9), (300, 310)])
def ragged_lengths_have_the_mean_and_the_limit_they_state_test(mean, longest):
    lengths = ragged_lengths(32, mean=mean, longest=longest)
    assert abs(np.mean(lengths) - mean) < 1
    assert min(lengths) >= 1 and max(lengths) <= longest


def a_mean_above_the_longest_is_refused_test():
    with pytest.raises(ValueError, match=r"must be in \[1, 8\], got 9"):
        ragged_lengths(4, mean=9, longest=8)


def all_that_is_not_live_is_poisoned_test():
    inputs = inputs_of(RAGGED)
    live = np.isfinite(np.asarray(inputs.k_pages)).all(axis=-1)
    np.testing.assert_array_equal(live, np.isfinite(np.asarray(inputs.v_pages)).all(axis=-1))
    assert live.sum() == inputs.lengths.sum()
    assert np.any(inputs.page_table < 0) and np.any(inputs.page_table >= live.shape[0])


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.zeros((2, 4))}, r"q must be \[R G H\], got shape \(2, 4\)"),
        ({"k_pages": jnp.zeros((5, 8, 16))}, r"k_pages must be \[P page H\] with H = 32 as in q"),
        ({"v_pages": jnp.zeros((6, 8, 32))}, "v_pages must .* with P = 5 as in k_pages"),
        ({"page_table": jnp.zeros((3, 4), jnp.int32)}, "page_table must .* with R = 2 as in q"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, "lengths must .* with R = 2 as in q"),
        ({"page_table": jnp.zeros((2, 0), jnp.int32)}, "page_table is empty: maxp = 0"),
        (
            {"k_pages": jnp.zeros((5, 4, 32)), "v_pages": jnp.zeros((5, 4, 32))},
            "page must be a power of two >= 8, got 4",
        ),
        (
            {"k_pages": jnp.zeros((5, 24, 32)), "v_pages": jnp.zeros((5, 24, 32))},
            "page must be a power of two >= 8, got 24",
        ),
        ({"q": jnp.zeros((2, 4, 32), jnp.int32)}, "q must be float32 or bfloat16, got int32"),
        ({"k_pages": jnp.zeros((5, 8, 32), jnp.bfloat16)}, "k_pages is bfloat16 but v_pages float"),
        ({"page_table": jnp.zeros((2, 4))}, "page_table must be int32, got float32"),
        ({"lengths": jnp.zeros(2, jnp.uint32)}, "lengths must be int32, got uint32"),
    ],
)
def inputs_that_break_the_contract_are_named_test(change, message):
    inputs = {
        "q": jnp.zeros((2, 4, 32)),
        "k_pages": jnp.zeros((5, 8, 32)),
        "v_pages": jnp.zeros((5, 8, 32)),
        "page_table": jnp.zeros((2, 4), jnp.int32),
        "lengths": jnp.zeros(2, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**(inputs | change), scale=1.0)


@pytest.mark.parametrize("name", ["XLA", "pallas", ""])
def an_unknown_implementation_is_refused_and_never_replaced_test(name):
    with pytest.raises(ValueError, match="there is reference, xla, triton"):
        decode_attention(*inputs_of(RAGGED), scale=1.0, implementation=name)


@without_a_gpu
def a_gpu_implementation_without_a_gpu_says_what_it_lacks_test():
    with pytest.raises(RuntimeError, match="'triton' .* cannot run here: .*(GPU|imported)"):
        decode_attention(*inputs_of(RAGGED), scale=1.0, implementation="triton")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="there is a TPU")
def a_tpu_implementation_without_a_tpu_says_what_it_lacks_test():
    with pytest.raises(RuntimeError, match="'tpu' .* cannot run here: it needs a TPU, and JAX"):
        decode_attention(*inputs_of(RAGGED), scale=1.0, implementation="tpu")


def on_a_tpu_its_kernel_runs_where_it_is_asked_for_test(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: TPU)
    assert choose(None) == "xla"
    assert choose("tpu") == "tpu"


def on_a_gpu_the_best_that_can_run_is_taken_test(monkeypatch):
    here = set(IMPLEMENTATIONS.names)
    monkeypatch.setattr(target, "current", lambda: GPU)
    monkeypatch.setattr(
        Implementations, "unavailable", lambda self, name: None if name in here else "no"
    )
    for name in ("triton", "xla"):
        assert choose(None) == name
        here.remove(name)
