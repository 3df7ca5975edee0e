"""Attention over pages: against numbers worked out by hand, the kernel against the reference.

Without a GPU the kernel runs interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import chunk_attention, paged_cache, prefill
from dmc_jax.inference.chunk_attention import attend_pages
from dmc_jax.inference.pages import Pages
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from pallas_kernels.prefill_attention import api
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS, prefill_attention
from pallas_kernels.prefill_attention.settings import Settings
from pallas_kernels.prefill_attention.workloads import CORRECTNESS, Workload, make_inputs
from pallas_kernels.quantisation import quantise, rounded
from tests.pallas_kernels import interpreted

# Relative and absolute, of means of numbers of size 1. On a GPU weights are bfloat16 too.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

MIXED = CORRECTNESS[1]

pytestmark = pytest.mark.usefixtures("exact_products")

every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS.names)


@pytest.fixture(autouse=True)
def interpreted_without_a_gpu(request, monkeypatch):
    """For tests of the kernel, and for those that say nothing: what a GPU would choose."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("name", "triton") == "triton":
        interpreted.let_run("prefill_attention", "triton", monkeypatch)


@functools.cache
def inputs_and_expected(workload):
    arrays, first = make_inputs(workload)
    return (arrays, first), attend(workload, arrays, first, "reference")


def attend(workload, arrays, first, name):
    scale = workload.width**-0.5
    return prefill_attention(*arrays, first=first, scale=scale, implementation=name)


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[str(expected.dtype)]
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the meaning, by hand -----------------------------------------------------------------------


def by_hand(name, slot, q=None, own_k=None, lengths=(10,), seats=(0,), dtype="float32"):
    """A row of two pages of 8, whose slot s has key 1 and value s; token t's own value is 100 + t.

    Row 0 of the table, of another layer, has no pages.
    """
    T = len(slot)
    values = jnp.full((3, 8, 4), jnp.nan).at[2].set(jnp.arange(8.0)[:, None])
    values = values.at[0, :2].set(jnp.array([8.0, 9.0])[:, None])
    own_v = jnp.broadcast_to(100.0 + jnp.arange(T)[None, :, None, None], (1, T, 1, 4))
    keys = jnp.where(jnp.isnan(values), jnp.nan, 1.0)
    out = prefill_attention(
        jnp.zeros((1, T, 2, 4)) if q is None else q,
        jnp.ones((1, T, 1, 4)) if own_k is None else own_k,
        own_v,
        jnp.array(slot, jnp.int32)[None, None],
        *(keys.astype(dtype), values.astype(dtype)),
        jnp.array([[[-1, 99], [2, 0]]], jnp.int32),
        jnp.array([[16, *lengths]], jnp.int32),
        jnp.array(seats, jnp.int32),
        first=1,
        scale=1.0,
        implementation=name,
    )
    return np.asarray(out)[0, :, :, 0]  # [T, 2], of equal channels


@every_implementation
def equal_scores_give_the_mean_of_the_slots_before_and_of_the_own_state_test(name):
    out = by_hand(name, [0, 3, 3, 9])
    means = [100, (0 + 1 + 2 + 101) / 4, (0 + 1 + 2 + 102) / 4, (sum(range(9)) + 103) / 10]
    np.testing.assert_allclose(out, np.repeat(means, 2).reshape(4, 2), rtol=1e-6)


@every_implementation
def scores_are_dot_products_with_keys_of_pages_and_of_the_token_test(name):
    # Scores log 3 of the slot and 2 log 3 of the token: weights 1/4 and 3/4; negated the reverse.
    q = jnp.zeros((1, 1, 2, 4)).at[..., 0].set(np.log(3.0) * jnp.array([1.0, -1.0]))
    out = by_hand(name, [1], q, own_k=2 * jnp.ones((1, 1, 1, 4)))
    np.testing.assert_allclose(out, [[75.0, 25.0]], rtol=1e-5)


@every_implementation
def slots_may_fall_and_lie_beyond_the_row_test(name):
    out = by_hand(name, [12, -5, 2, 10**9, 0])
    beyond = sum(range(10))
    means = [(beyond + 100) / 11, 101, (0 + 1 + 102) / 3, (beyond + 103) / 11, 104]
    np.testing.assert_allclose(out, np.repeat(means, 2).reshape(5, 2), rtol=1e-6)


@every_implementation
@pytest.mark.parametrize("seat", [-3, 1, 2**31 - 1])
def a_seat_outside_the_table_is_the_nearest_inside_test(name, seat):
    np.testing.assert_array_equal(by_hand(name, [5], seats=(seat,)), by_hand(name, [5]))


@every_implementation
def the_own_state_is_rounded_as_the_pool_would_hold_it_test(name):
    # 257 and 1.001 need more bits than bfloat16 has.
    q = jnp.zeros((1, 158, 2, 4)).at[..., 0].set(1.0)
    out = by_hand(name, [0] * 157 + [1], q, jnp.full((1, 158, 1, 4), 1.001), dtype="bfloat16")
    assert out[156, 0] == 256.0  # token 156's value is 256
    np.testing.assert_allclose(out[157], (256.0 + 0.0) / 2, rtol=1e-6)


# ---- the kernel against the reference -----------------------------------------------------------


@pytest.mark.parametrize("workload", CORRECTNESS, ids=str)
def the_kernel_gives_what_the_reference_gives_test(workload):
    # Pages are shuffled and all that is unused is NaN: a stray read would show.
    inputs, expected = inputs_and_expected(workload)
    assert_close(attend(workload, *inputs, "triton"), expected)


@every_implementation
@pytest.mark.parametrize("workload", [CORRECTNESS[2], CORRECTNESS[3]], ids=str)
def pages_of_int8_are_attended_to_as_what_they_stand_for_test(name, workload):
    """And what a token wrote itself as if it were there."""
    (q, own_k, own_v, slot, *pools, table, lengths, seats), first = make_inputs(workload)
    scales, narrow, wide = [], [], []
    for pool in pools:
        dead = jnp.isnan(pool.astype(jnp.float32)).any(axis=-1)
        steps, scale = quantise(pool, workload.dtype)
        narrow.append(jnp.where(dead[..., None], 127, steps).astype(jnp.int8))
        scales.append(jnp.where(dead, jnp.nan, scale))
        wide.append(steps * jnp.where(dead, jnp.nan, scale.astype(jnp.float32))[..., None])
    own = [rounded(x, workload.dtype).astype(jnp.float32) for x in (own_k, own_v)]
    how = {"first": first, "scale": workload.width**-0.5}
    out = prefill_attention(
        *(q, own_k, own_v, slot, *narrow, table, lengths, seats),
        **how,
        implementation=name,
        **dict(zip(("k_scale", "v_scale"), scales, strict=True)),
    )
    expected = prefill_attention(
        *(q, *own, slot, *wide, table, lengths, seats), **how, implementation="reference"
    )
    assert_close(out, expected)


@pytest.mark.parametrize("queries, slots", [(16, 16), pytest.param(64, 32, marks=pytest.mark.slow)])
def results_do_not_depend_on_the_blocks_test(queries, slots):
    (arrays, first), expected = inputs_and_expected(MIXED)
    out = IMPLEMENTATIONS.load("triton").prefill_attention(
        *arrays[:-1],
        jnp.minimum(arrays[-1], MIXED.batch - 1),
        first=first,
        scale=MIXED.width**-0.5,
        settings=Settings(queries, slots, 4, 3),
    )
    assert_close(out, expected)


def the_same_inputs_give_the_same_bits_test():
    workload = CORRECTNESS[3]
    inputs, _ = inputs_and_expected(workload)
    first, second = (np.asarray(attend(workload, *inputs, "triton")).tobytes() for _ in range(2))
    assert first == second


@pytest.mark.slow
def no_size_around_those_of_blocks_differs_from_the_reference_test():
    for seed, (T, page) in enumerate([(31, 8), (32, 16), (33, 32), (63, 64), (65, 128), (128, 16)]):
        workload = Workload(2, T, 2, 1, 16, page, 3 * T)
        arrays, first = make_inputs(workload, seed)
        expected = attend(workload, arrays, first, "reference")
        assert_close(attend(workload, arrays, first, "triton"), expected)


# ---- in prefill, against XLA's form -------------------------------------------------------------


@pytest.mark.parametrize("workload", CORRECTNESS[1:3], ids=str)
def attention_of_prefill_is_the_same_by_xla_and_by_the_kernel_test(workload):
    (q, own_k, own_v, slot, *pools, table, lengths, seats), first = make_inputs(workload)
    cache = paged_cache.PagedCache(
        *(Pages(*pools), table, lengths, (), *[jnp.zeros(workload.batch, jnp.int32)] * 2),
        *(jnp.int32(0), jnp.zeros(workload.batch, bool)),
        most_pages=jnp.zeros(workload.batch, jnp.int32),
    )
    outs = [
        np.asarray(
            attend_pages(q, own_k, own_v, slot, cache, first, seats, name), np.float32
        ).reshape(workload.batch, workload.length, workload.kv_heads, -1)
        for name in ("triton", "xla")
    ]
    # A row that was refused a page means nothing: XLA's form reads what is not there.
    length = paged_cache.take_rows(lengths, first, workload.kv_heads, seats)[:, None]
    held = np.asarray(slot.swapaxes(1, 2) <= length)
    assert held.mean() > 0.5
    tolerance = TOLERANCE[workload.dtype]
    np.testing.assert_allclose(*(x[held] for x in outs), rtol=tolerance, atol=tolerance)


def tiny_model():
    config = ModelConfig(
        vocab_size=20,
        width=16,
        layers=2,
        heads=4,
        kv_heads=(2, 1),
        head_dim=16,
        mlp_width=24,
        rope_theta=100.0,
        norm_eps=1e-5,
        max_length=64,
        tied_embeddings=True,
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: unstack_layers(init_params(config, jax.random.key(0)), config, jnp.float32)
    )
    return config, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def logits_of_prompts(policy):
    config, params = tiny_model()
    cache = paged_cache.init(
        *(config, policy), seats=4, pages=60, page_size=8, max_length=64, dtype=jnp.float32
    )
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.pages)
    prompts = np.random.default_rng(1).integers(0, 20, (3, 40))
    _, logits = prefill.prefill(
        *(params, config, dataclasses.replace(cache, pages=nan)),
        [row[:length] for row, length in zip(prompts, (40, 3, 20), strict=True)],
        (2, 0, 3),
        policy=policy,
        chunk=16,
    )
    return logits


@pytest.mark.parametrize(
    "policy",
    [
        DMC(DMCSettings(window=3, offset=0.0)),
        pytest.param(Dense(), marks=pytest.mark.slow),
    ],
    ids=lambda policy: policy.name,
)
def prompts_in_chunks_give_the_logits_that_they_give_by_xla_test(policy, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(None)
        return prefill_attention(*arguments, **options)

    monkeypatch.setattr(chunk_attention, "prefill_attention", counted)
    jax.clear_caches()  # a layer's program is kept whatever the machine is said to be
    logits = logits_of_prompts(policy)
    assert calls
    monkeypatch.setattr(chunk_attention, "choose", lambda name: "xla")
    jax.clear_caches()
    np.testing.assert_allclose(logits, logits_of_prompts(policy), rtol=1e-4, atol=1e-4)


# ---- broken contracts ---------------------------------------------------------------------------


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize("name", ["reference"])
@pytest.mark.parametrize(
    "array, shape, dtype, message",
    [
        ("q", (1, 8, 16), "float32", r"q must be \[B T N H\], got shape \(1, 8, 16\)"),
        ("q", (1, 8, 3, 16), "float32", "3 query heads cannot share 2 KV heads: 3 % 2 != 0"),
        ("q", (1, 8, 4, 16), "float16", "q must be float32 or bfloat16, got float16"),
        ("own_k", (1, 9, 2, 16), "float32", r"own_k must be \[B T K H\] with T = 8 as in q"),
        ("own_v", (1, 8, 1, 16), "float32", r"own_v must be .* with K = 2 as in own_k"),
        ("slot", (1, 8, 2), "int32", r"slot must be \[B K T\] with K = 2 as in own_k"),
        ("slot", (1, 2, 8), "int16", "slot must be int32, got int16"),
        ("k_pages", (3, 8, 32), "float32", r"k_pages must be \[P page H\] with H = 16 as in q"),
        ("v_pages", (3, 8, 16), "bfloat16", "k_pages is float32 but v_pages bfloat16"),
        ("page_table", (2, 6, 0), "int32", r"page_table is empty: maxp = 0 in shape \(2, 6, 0\)"),
        ("page_table", (2, 6, 5), "float32", "page_table must be int32, got float32"),
        ("lengths", (2, 7), "int32", r"lengths must be \[seats R\] with R = 6 as in page_table"),
        ("seats", (2,), "int32", r"seats must be \[B\] with B = 1 as in q, got shape \(2,\)"),
    ],
)
def broken_contracts_are_named_test(name, array, shape, dtype, message):
    arrays = {
        "q": jnp.zeros((1, 8, 4, 16)),
        "own_k": jnp.zeros((1, 8, 2, 16)),
        "own_v": jnp.zeros((1, 8, 2, 16)),
        "slot": jnp.zeros((1, 2, 8), jnp.int32),
        "k_pages": jnp.zeros((3, 8, 16)),
        "v_pages": jnp.zeros((3, 8, 16)),
        "page_table": jnp.zeros((2, 6, 5), jnp.int32),
        "lengths": jnp.zeros((2, 6), jnp.int32),
        "seats": jnp.zeros(1, jnp.int32),
    } | {array: jnp.zeros(shape, dtype)}
    with pytest.raises(ValueError, match=message):
        prefill_attention(**arrays, first=0, scale=1.0, implementation=name)


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize("name", ["reference"])
def a_layer_with_more_rows_than_the_table_is_refused_test(name):
    arrays, first = make_inputs(CORRECTNESS[0])
    arrays = list(arrays)
    arrays[:4] = [jnp.repeat(x, 4, axis=2) for x in arrays[:3]] + [jnp.repeat(arrays[3], 4, axis=1)]
    with pytest.raises(ValueError, match="a layer of K = 4 rows does not fit into the R = 3"):
        prefill_attention(*arrays, first=first, scale=1.0, implementation=name)


def what_a_gpu_lacks_sends_prefill_to_xla_test(monkeypatch):
    module = IMPLEMENTATIONS.load("triton")
    assert api.choose(None) == "triton"
    monkeypatch.setattr(module, "unavailable", lambda: "it is gone")
    assert api.choose(None) == "xla"
