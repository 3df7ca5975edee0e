"""Attention with a key bias: against a loop over its definition, kernels against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core import attention as core
from pallas_kernels.causal_attention import api, reference
from pallas_kernels.causal_attention.settings import Blocks, Settings
from pallas_kernels.causal_attention.workloads import CORRECTNESS, Workload, make_inputs
from tests.pallas_kernels import interpreted

triton = pytest.importorskip("triton", reason="triton is not installed")

from pallas_kernels.causal_attention import triton as kernels  # noqa: E402

# Of outputs and gradients, relative to the largest element, or to 1.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

SMALL = Settings(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1))


pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(autouse=True)
def interpreted_without_a_gpu(monkeypatch):
    interpreted.let_run("causal_attention", "triton", monkeypatch)


def attention_by_loops(q, k, v, bias, scale, segment_ids, spared):
    """Every output from its own softmax, in float64."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    B, T, N, H = q.shape
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(B, T, N):
        head = n // (N // k.shape[2])
        seen = [j for j in range(i + 1) if segment_ids[b, j] == segment_ids[b, i]]
        scores = [
            scale * q[b, i, n] @ k[b, j, head] + (bias[b, j, head] if i - j >= spared else 0.0)
            for j in seen
        ]
        weights = np.exp(scores - np.max(scores))
        out[b, i, n] = weights / weights.sum() @ v[b, seen, head]
    return out


def assert_close(got, expected, dtype):
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    largest = max(np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * largest)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, inputs, d_out):
    out, pullback = jax.vjp(attend, *inputs)
    return out, *pullback(d_out)


@pytest.mark.parametrize("spared", [1, 5])
def the_reference_is_the_formula_test(spared):
    inputs, segment_ids, _ = make_inputs(Workload(2, 20, 4, 2, 8))
    attend = functools.partial(reference.causal_attention, scale=0.3, spared=spared)
    got = jax.jit(attend)(*inputs, segment_ids=segment_ids)
    expected = attention_by_loops(*inputs, 0.3, np.asarray(segment_ids), spared)
    assert_close(got, expected, "float32")


@pytest.mark.parametrize("workload", CORRECTNESS, ids=str)
def outputs_and_all_gradients_equal_the_reference_test(workload):
    inputs, segment_ids, d_out = make_inputs(workload)
    how = {"scale": workload.width**-0.5, "segment_ids": segment_ids}
    got, expected = (
        with_gradients(functools.partial(attend, **how, **more), inputs, d_out)
        for attend, more in (
            (kernels.causal_attention, {"settings": SMALL}),
            (reference.causal_attention, {}),
        )
    )
    for one, other, like in zip(got, expected, (inputs[0], *inputs), strict=True):
        assert one.dtype == other.dtype == like.dtype
        assert_close(one, other, workload.dtype)


@pytest.mark.parametrize("queries, keys", [(16, 16), (64, 16), (32, 32)])
def results_do_not_depend_on_the_blocks_test(queries, keys):
    inputs, segment_ids, d_out = make_inputs(Workload(1, 50, 2, 1, 16), seed=1)
    forward, backward = Blocks(queries, keys, 4, 1), Blocks(keys, queries, 4, 1)
    got, expected = (
        with_gradients(
            functools.partial(
                kernels.causal_attention, scale=0.25, segment_ids=segment_ids, settings=settings
            ),
            inputs,
            d_out,
        )
        for settings in (Settings(forward, backward, forward), SMALL)
    )
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, "float32")


# Less than a block, a block and one more, more than two of them, all.
@pytest.mark.parametrize("spared", [2, 17, 40, 100])
def keys_may_be_spared_for_more_than_their_own_token_test(spared):
    inputs, segment_ids, d_out = make_inputs(Workload(1, 80, 2, 1, 16), seed=3)
    how = {"scale": 0.25, "segment_ids": segment_ids, "spared": spared}
    expected = with_gradients(functools.partial(reference.causal_attention, **how), inputs, d_out)
    for attend in (
        functools.partial(kernels.causal_attention, settings=SMALL),
        functools.partial(core.causal_attention, block=16),
    ):
        got = with_gradients(functools.partial(attend, **how), inputs, d_out)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, "float32")


# Of raw tokens and of states after a delay; blocks have 16 and 32 tokens.
@pytest.mark.parametrize(
    "first, until, spared",
    [
        *((0, 20, 1), (0, 33, 3), (16, None, 17), (90, None, 1)),
        *(
            pytest.param(*ages, marks=pytest.mark.slow)
            for ages in ((0, 1, 1), (7, 30, 9), (5, None, 6), (40, None, 41))
        ),
    ],
)
def keys_of_any_ages_with_two_biases_equal_the_reference_test(first, until, spared):
    inputs, segment_ids, d_out = make_inputs(Workload(2, 80, 4, 2, 16), seed=4)
    rng = np.random.default_rng(5)
    spared_bias, d_lse = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (inputs[3].shape, d_out.shape[:3])
    )
    how = {"scale": 0.25, "segment_ids": segment_ids, "spared": spared}
    how |= {"first": first, "until": until, "with_lse": True}

    def attended(attend):
        def run(q, k, v, bias, spared_bias):
            out, lse = attend(q, k, v, bias, spared_bias=spared_bias, **how)
            return out, jnp.where(jnp.isneginf(lse), 0.0, lse), jnp.isneginf(lse)

        (*values, blind), pullback = jax.vjp(run, *inputs, spared_bias)
        nothing = np.zeros(blind.shape, jax.dtypes.float0)
        return *values, blind, *pullback((d_out, d_lse, nothing))

    expected = attended(reference.causal_attention)
    assert expected[2].any() == (first > 0)
    for attend in (
        functools.partial(kernels.causal_attention, settings=SMALL),
        functools.partial(core.causal_attention, block=16),
    ):
        for one, other in zip(attended(attend), expected, strict=True):
            assert_close(one, other, "float32")


@pytest.mark.parametrize("first, until", [(-1, None), (3, 3), (0, 0)])
def ages_that_no_key_has_are_refused_test(first, until):
    (q, k, v, bias), _, _ = make_inputs(Workload(1, 8, 1, 1, 16))
    ages = {"first": first, "until": until}
    with pytest.raises(ValueError, match="ages must be 0 <= first < until"):
        api.causal_attention(q, k, v, bias, scale=1.0, **ages, implementation="reference")


def without_a_bias_it_is_ordinary_attention_test():
    (q, k, v, _), _, _ = make_inputs(Workload(1, 40, 4, 2, 16, documents=False))
    got = kernels.causal_attention(q, k, v, scale=0.25, settings=SMALL)
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.25, is_causal=True)
    assert_close(got, expected, "float32")


def the_chunked_form_and_the_kernels_are_one_function_test():
    """Two gradients that were derived and written apart."""
    inputs, segment_ids, d_out = make_inputs(Workload(2, 45, 4, 2, 16), seed=2)
    how = {"scale": 0.25, "segment_ids": segment_ids}
    chunked = functools.partial(core.causal_attention, block=16, **how)
    kernel = functools.partial(kernels.causal_attention, settings=SMALL, **how)
    for one, other in zip(
        with_gradients(kernel, inputs, d_out), with_gradients(chunked, inputs, d_out), strict=True
    ):
        assert_close(one, other, "float32")


def a_superseded_key_is_seen_by_its_own_token_alone_test():
    (q, k, v, _), _, _ = make_inputs(Workload(1, 20, 1, 1, 16, documents=False))
    superseded = jnp.array([1, 0, 0, 1, 1, 1, 0, 0, 0, 1] * 2)
    bias = (-50_000.0 * superseded)[None, :, None]
    got = kernels.causal_attention(q, k, v, bias, scale=0.25, settings=SMALL)
    visible = jnp.tril(jnp.ones((20, 20), bool)) & ((superseded == 0) | jnp.eye(20, dtype=bool))
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.25, mask=visible[None, None])
    assert_close(got, expected, "float32")


def a_recomputed_and_scanned_layer_has_the_same_gradient_test():
    """As training uses it: inside `jit`, `scan` and `checkpoint`."""
    (q, k, v, bias), _, _ = make_inputs(Workload(1, 33, 2, 1, 16, documents=False))

    def loss(q, attend):
        @jax.checkpoint
        def layer(x, _):
            return x + attend(x, k, v, bias, scale=0.25), None

        return jnp.sum(jax.lax.scan(layer, q, length=2)[0] ** 2)

    kernel = functools.partial(kernels.causal_attention, settings=SMALL)
    got = jax.jit(jax.grad(functools.partial(loss, attend=kernel)))(q)
    expected = jax.grad(functools.partial(loss, attend=reference.causal_attention))(q)
    assert_close(got, expected, "float32")


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS.names)
def a_name_gets_the_implementation_with_its_kept_settings_test(name):
    inputs, segment_ids, _ = make_inputs(Workload(2, 40, 4, 2, 16))
    how = {"scale": 0.25, "segment_ids": segment_ids}
    got = api.causal_attention(*inputs, **how, implementation=name)
    assert_close(got, reference.causal_attention(*inputs, **how), "float32")


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize(
    "name, shape, dtype, message",
    [
        ("q", (1, 8, 16), "float32", r"q must be \[B T N H\], got shape \(1, 8, 16\)"),
        ("k", (1, 9, 2, 16), "float32", r"k must be \[B T K H\] with T = 8"),
        ("v", (1, 8, 1, 16), "float32", r"v must be \[B T K H\] with K = 2"),
        ("q", (1, 8, 3, 16), "float32", "3 query heads cannot share 2 KV heads"),
        ("q", (1, 8, 4, 16), "float16", "q must be float32 or bfloat16, got float16"),
        ("key_bias", (1, 8, 4), "float32", r"key_bias must be \[B T K\] with K = 2"),
        ("segment_ids", (1, 7), "int32", r"segment_ids must be \[B T\] with T = 8"),
    ],
)
def broken_contracts_are_named_test(name, shape, dtype, message):
    arrays = {"q": jnp.zeros((1, 8, 4, 16)), "k": jnp.zeros((1, 8, 2, 16))}
    arrays |= {"v": arrays["k"], name: jnp.zeros(shape, dtype)}
    with pytest.raises(ValueError, match=message):
        api.causal_attention(**arrays, scale=1.0, implementation="reference")


@pytest.mark.slow
def a_key_is_always_spared_for_its_own_token_test(monkeypatch):
    (q, k, v, bias), _, _ = make_inputs(Workload(1, 8, 1, 1, 16))
    with pytest.raises(ValueError, match="spared must be 1 or more, got 0"):
        api.causal_attention(q, k, v, bias, scale=1.0, spared=0, implementation="reference")


@pytest.mark.slow
def no_random_case_differs_from_the_reference_test():
    """Sizes around those of blocks, where an index off by one would show."""
    for seed, (T, (N, K)) in enumerate(itertools.product((15, 16, 17, 31, 33), ((1, 1), (2, 1)))):
        inputs, segment_ids, d_out = make_inputs(Workload(1, T, N, K, 16), seed=seed)
        how = {"scale": 0.25, "segment_ids": segment_ids}
        kernel = functools.partial(kernels.causal_attention, settings=SMALL, **how)
        expected = functools.partial(reference.causal_attention, **how)
        for one, other in zip(
            with_gradients(kernel, inputs, d_out),
            with_gradients(expected, inputs, d_out),
            strict=True,
        ):
            assert_close(one, other, "float32")
