"""Blocked attention against the definition; its memory; hand-written masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.attention import causal_attention, definition, join

VALUE, GRADIENT = 1e-5, 1e-4


def defined(q, k, v, bias, scale, segment_ids, spared=1, with_lse=False, **ages):
    grouped = q.reshape(*k.shape[:3], -1, q.shape[-1])
    out, lse = definition(grouped, k, v, bias, scale, segment_ids, spared, **ages)
    return (out.reshape(q.shape), lse.reshape(q.shape[:3])) if with_lse else out.reshape(q.shape)


def draw(seed, B, T, N, K, H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 6)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k, v = (jax.random.normal(key, (B, T, K, H), dtype) for key in keys[1:3])
    bias = -3 * jax.random.uniform(keys[3], (B, T, K))
    bias = jnp.where(jax.random.uniform(keys[4], (B, T, K)) < 0.3, -50_000.0, bias)
    segment_ids = jnp.cumsum(jax.random.uniform(keys[5], (B, T)) < 0.1, axis=1)
    return q, k, v, bias, segment_ids


@pytest.mark.parametrize(
    "T, heads, block, spared",
    [
        (1, (1, 1), 8, 1),
        (16, (4, 2), 16, 1),
        (17, (4, 2), 16, 3),
        (33, (8, 1), 8, 16),
        (50, (4, 4), 64, 1),
    ],
)
def values_and_gradients_are_those_of_the_definition_test(T, heads, block, spared):
    q, k, v, bias, segment_ids = draw(T, 2, T, *heads, 8)
    weight = jax.random.normal(jax.random.key(7), q.shape)

    def of(attention):
        def loss(q, k, v, bias):
            out = attention(q, k, v, bias)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias)

    (_, actual), actual_gradients = of(
        lambda *a: causal_attention(
            *a, scale=0.3, segment_ids=segment_ids, block=block, spared=spared
        )
    )
    (_, expected), expected_gradients = of(lambda *a: defined(*a, 0.3, segment_ids, spared))
    np.testing.assert_allclose(actual, expected, atol=VALUE)
    for gradient, wanted in zip(actual_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=GRADIENT, atol=GRADIENT)


@pytest.mark.parametrize("T, block", [(1, 8), (33, 8), (50, 64), (48, 16)])
@pytest.mark.parametrize("first, until", [(0, 1), (0, 2), (0, 16), (5, 6), (16, None), (60, None)])
def keys_of_any_ages_with_two_biases_and_lse_are_those_of_the_definition_test(
    T, block, first, until
):
    q, k, v, bias, segment_ids = draw(T, 2, T, 4, 2, 8)
    spared_bias = jax.random.normal(jax.random.key(6), bias.shape)
    weights = [jax.random.normal(jax.random.key(7 + i), q.shape[: 4 - i]) for i in range(2)]
    ages = {"spared": first + 1, "first": first, "until": until}

    def of(attention):
        def loss(q, k, v, bias, spared_bias):
            out, lse = attention(q, k, v, bias, spared_bias=spared_bias, with_lse=True, **ages)
            seen = jnp.where(lse > -jnp.inf, lse, 0.0)
            return sum(jnp.sum(x * w) for x, w in zip((out, seen), weights, strict=True)), (
                out,
                lse,
            )

        arguments = q, k, v, bias, spared_bias
        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*arguments)

    (_, actual), gradients = of(
        functools.partial(causal_attention, scale=0.3, segment_ids=segment_ids, block=block)
    )
    (_, expected), wanted = of(functools.partial(defined, scale=0.3, segment_ids=segment_ids))
    for found, value in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found, value, atol=VALUE)
    blind = np.asarray(expected[1]) == -np.inf
    assert not np.asarray(actual[0])[blind].any() and (blind.any() or first == 0)
    for found, value in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=GRADIENT, atol=GRADIENT)


def two_sets_of_keys_join_in_one_softmax_test():
    q, k, v, bias, segment_ids = draw(9, 2, 40, 4, 2, 8)

    def loss(attend, q, k, v, bias):
        out = attend(q, k, v, bias)
        return jnp.sum(out**2), out

    def in_two(*arguments):
        attend = functools.partial(
            causal_attention, scale=0.3, segment_ids=segment_ids, with_lse=True, block=16
        )
        return join(attend(*arguments, until=7), attend(*arguments, first=7))

    def at_once(*arguments):
        return causal_attention(*arguments, scale=0.3, segment_ids=segment_ids)

    (_, actual), gradients = jax.value_and_grad(
        functools.partial(loss, in_two), argnums=range(4), has_aux=True
    )(q, k, v, bias)
    (_, expected), wanted = jax.value_and_grad(
        functools.partial(loss, at_once), argnums=range(4), has_aux=True
    )(q, k, v, bias)
    np.testing.assert_allclose(actual, expected, atol=VALUE)
    for found, value in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=GRADIENT, atol=GRADIENT)


def bfloat16_is_within_its_rounding_of_float32_test():
    q, k, v, bias, segment_ids = draw(3, 2, 64, 4, 2, 32, jnp.bfloat16)
    run = functools.partial(causal_attention, scale=0.2, segment_ids=segment_ids, block=16)

    def loss(q, k, v):
        return jnp.sum(run(q, k, v, bias).astype(jnp.float32) ** 2)

    narrow = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    wide = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        *(x.astype(jnp.float32) for x in (q, k, v))
    )
    np.testing.assert_allclose(narrow[0], wide[0], rtol=0.01)
    for gradient, wanted in zip(narrow[1], wide[1], strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = jnp.linalg.norm(gradient.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        assert error < 0.02


@pytest.mark.parametrize("attend", [causal_attention, defined])
def zeros_and_ones_by_hand_test(attend):
    """Equal scores, so a query averages what it sees: masks of three tokens, written out."""
    q = jnp.zeros((1, 4, 1, 2))
    v = jnp.eye(4)[None, :, None, :]  # [1, 4, 1, 4] values tell which key was seen
    bias = jnp.array([0.0, -50_000.0, 0.0, 0.0])[None, :, None]  # key 1 is superseded
    segments = jnp.array([[1, 1, 1, 2]])
    k = jnp.zeros((1, 4, 1, 2))
    out = [
        attend(q, k, v[..., 2 * c : 2 * c + 2], bias, scale=1.0, segment_ids=segments)
        for c in (0, 1)
    ]
    seen = jnp.concatenate(out, axis=-1)[0, :, 0] > 0
    expected = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],  # its own state is open although it is superseded later
        [1, 0, 1, 0],
        [0, 0, 0, 1],  # another document
    ]
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def memory_grows_no_faster_than_the_length_test(backward):
    def temporaries(T):
        shapes = [jax.ShapeDtypeStruct((1, T, n, 32), jnp.float32) for n in (4, 2, 2)]
        shapes.append(jax.ShapeDtypeStruct((1, T, 2), jnp.float32))

        def run(q, k, v, bias):
            return causal_attention(q, k, v, bias, scale=1.0).sum()

        function = jax.grad(run, argnums=(0, 1, 2, 3)) if backward else run
        compiled = jax.jit(function).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(T) for T in (1024, 2048, 4096)]
    assert sizes[1] <= 2.3 * sizes[0] and sizes[2] <= 2.3 * sizes[1], sizes
    whole_matrix = 4 * 4096 * 4096 * 4
    assert sizes[2] < whole_matrix / 4, sizes


def heads_that_do_not_divide_are_refused_test():
    q, k = jnp.zeros((1, 4, 3, 2)), jnp.zeros((1, 4, 2, 2))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        causal_attention(q, k, k, scale=1.0)
