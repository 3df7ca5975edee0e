"""The model against a slow NumPy Llama; sizes; policies; layers of different shapes."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.losses import token_losses
from dmc_jax.core.rope import Llama3Scaling
from dmc_jax.errors import UserError
from dmc_jax.model.llama import (
    Llama,
    count_parameters,
    forward,
    init_params,
    layer_stacks,
    unstack_layers,
)
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole, decision_means

SMALL = ModelConfig(
    vocab_size=17,
    width=12,
    layers=3,
    heads=4,
    kv_heads=(2, 2, 1),
    head_dim=6,
    mlp_width=20,
    rope_theta=100.0,
    norm_eps=1e-5,
    max_length=64,
    tied_embeddings=False,
)
# What does not depend on how layers follow each other is asked of as few as can show it.
TWO_LAYERS = dataclasses.replace(SMALL, layers=2, kv_heads=2)
ONE_LAYER = dataclasses.replace(SMALL, layers=1, kv_heads=2)
POSITIONS = jnp.arange(9)[None].repeat(2, axis=0)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, 17)


def spread(params, scale=8.0):
    """Parameters large enough that every part of the model matters."""
    return jax.tree.map(lambda p: scale * p if p.ndim > 2 else p, params)


@functools.cache
def small_params(config=SMALL):
    return jax.jit(lambda key: spread(init_params(config, key)))(jax.random.key(1))


def logits_of(config, attend, params=None, **kwargs):
    params = small_params(config) if params is None else params
    model = Llama(config, **kwargs)
    return jax.jit(lambda p: model.apply({"params": p}, TOKENS, attend=attend).logits)(params)


@functools.cache
def dense_logits(config=SMALL):
    return logits_of(config, attend_whole(Dense(), config, POSITIONS))


def slow_llama(config, params, tokens):
    """The formulas of the Llama paper in NumPy, token by token, layer by layer."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(vector, position):
        half = config.head_dim // 2
        angle = position * config.rope_theta ** (-np.arange(half) / half)
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    x = p["embedding"][tokens]
    for run, (_, length, kv_heads) in enumerate(layer_stacks(config)):
        for i in range(length):
            w = jax.tree.map(lambda a, i=i: a[i], p[f"run_{run}"])
            y = norm(x, w["attention_norm"]["scale"])
            q, k, v = (np.einsum("td,dnh->tnh", y, w[n]["kernel"]) for n in "qkv")
            out = np.zeros_like(q)
            for t in range(len(tokens)):
                for n in range(config.heads):
                    group = n // (config.heads // kv_heads)
                    scores = [
                        turn(q[t, n], t) @ turn(k[s, group], s) / np.sqrt(config.head_dim)
                        for s in range(t + 1)
                    ]
                    weights = np.exp(scores - np.max(scores))
                    out[t, n] = (weights / weights.sum()) @ v[: t + 1, group]
            x = x + np.einsum("tnh,nhd->td", out, w["o"]["kernel"])
            y = norm(x, w["mlp_norm"]["scale"])
            gate, up = y @ w["gate"]["kernel"], y @ w["up"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"]) @ p["head"]


def dense_model_equals_the_formulas_test():
    actual = dense_logits()
    expected = [slow_llama(SMALL, small_params(), row) for row in np.asarray(TOKENS)]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    "preset, count",
    [
        ("tiny", 984_192),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("70b", 68_976_648_192),
        ("llama3_8b", 8_030_261_248),
        ("smollm2_135m", 134_515_008),
        ("deci_6b", 5_717_102_592),
    ],
)
def parameter_counts_are_the_published_ones_test(preset, count):
    assert count_parameters(PRESETS[preset]) == count


def deci_has_its_own_kv_heads_in_every_layer_test():
    assert layer_stacks(PRESETS["deci_6b"]) == ((0, 1, 4), (1, 9, 2), (10, 20, 1), (30, 2, 4))
    assert PRESETS["deci_6b"].kv_rows == 4 + 18 + 20 + 8


def every_mode_is_the_same_model_test():
    """Channel faded out, or merging impossible: the policies agree where their formulas do."""
    settings = DMCSettings(offset=1e4)  # nobody merges
    faded = logits_of(SMALL, attend_whole(Dense(0.0), SMALL, POSITIONS))
    hard = logits_of(SMALL, attend_whole(DMC(settings), SMALL, POSITIONS))
    relaxed = logits_of(
        SMALL, attend_whole(DMC(settings), SMALL, POSITIONS, noise_key=jax.random.key(0))
    )
    np.testing.assert_allclose(hard, faded, atol=1e-4)
    np.testing.assert_allclose(relaxed, faded, atol=1e-4)
    untouched = logits_of(SMALL, attend_whole(Dense(1.0), SMALL, POSITIONS))
    np.testing.assert_allclose(untouched, dense_logits(), atol=1e-5)
    assert np.abs(untouched - faded).max() > 0.01


def noise_depends_on_key_and_layer_test():
    settings = DMCSettings(offset=0.0)

    @jax.jit
    def run(key):
        attend = attend_whole(DMC(settings), SMALL, POSITIONS, noise_key=key)
        output = Llama(SMALL).apply({"params": small_params()}, TOKENS, attend=attend)
        return [record.decisions for record in output.records], decision_means(output)

    first, means = run(jax.random.key(0))
    again, other = run(jax.random.key(0))[0], run(jax.random.key(1))[0]
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).any()
    assert (first[0][0] != first[0][1]).any()
    expected = np.concatenate([d.mean(axis=(2, 3)) for d in first])
    np.testing.assert_allclose(means, expected, atol=1e-6)


def recomputation_changes_no_gradient_test():
    def gradient(remat):
        def loss(params):
            attend = attend_whole(
                DMC(DMCSettings(offset=0.0)), TWO_LAYERS, POSITIONS, noise_key=jax.random.key(0)
            )
            return jnp.sum(jnp.sin(logits_of(TWO_LAYERS, attend, params, remat=remat)))

        return jax.jit(jax.grad(loss))(small_params(TWO_LAYERS))

    wanted = gradient("none")
    for remat in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            gradient(remat),
            wanted,
        )


def recomputing_all_but_products_lies_between_all_and_nothing_test():
    config = dataclasses.replace(SMALL, layers=6, kv_heads=2, width=64, head_dim=16, mlp_width=256)
    tokens = jnp.zeros((8, 128), jnp.int32)
    attend = attend_whole(Dense(), config, jnp.broadcast_to(jnp.arange(128), tokens.shape))

    def took(remat):
        def loss(params):
            model = Llama(config, remat=remat)
            prediction = model.apply({"params": params}, tokens, attend=attend).prediction
            return token_losses(prediction, tokens)[0].mean()

        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (took(remat) for remat in ("none", "dots", "full"))
    # Of a layer, which is counted once however many follow it; nothing needs what "down" gives.
    D, F, H = config.width, config.mlp_width, config.head_dim
    products = 2 * tokens.size * (D * H * (2 * config.heads + 2 * 2) + 2 * D * F)
    assert full[0] - dots[0] == pytest.approx(products, rel=0.05)
    assert none[0] < dots[0] and full[1] < dots[1] < none[1]


def gradients_equal_finite_differences_test():
    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.sum(jnp.sin(logits_of(SMALL, attend_whole(Dense(), SMALL, POSITIONS), params)))

    params, rng = small_params(), np.random.default_rng(9)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    gradient = loss(params)[1]
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction)))
    h = 3e-4
    ahead, behind = (
        loss(
            jax.tree.map(lambda p, d, s=s: np.asarray(p) + s * np.float32(h) * d, params, direction)
        )[0]
        for s in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * h), along, rtol=0.02)


def tied_head_is_the_embedding_test():
    tied = dataclasses.replace(ONE_LAYER, tied_embeddings=True)
    params = dict(small_params(ONE_LAYER))
    params["head"] = params["embedding"].T
    untied = logits_of(ONE_LAYER, attend_whole(Dense(), ONE_LAYER, POSITIONS), params)
    del params["head"]
    assert jax.tree.structure(params) == jax.tree.structure(small_params(tied))
    actual = logits_of(tied, attend_whole(Dense(), tied, POSITIONS), params)
    np.testing.assert_allclose(actual, untied, atol=1e-5)


def theta_and_scaling_reach_the_attention_test():
    base = dense_logits(ONE_LAYER)
    theta = dataclasses.replace(ONE_LAYER, rope_theta=50.0)
    scaling = Llama3Scaling(factor=4.0, low_freq_factor=1, high_freq_factor=4, original_length=16)
    scaled = dataclasses.replace(ONE_LAYER, rope_scaling=scaling)
    settings = DMCSettings(offset=1e4)
    for config in (theta, scaled):
        for attend in (
            attend_whole(Dense(), config, POSITIONS),
            attend_whole(DMC(settings), config, POSITIONS),
        ):
            assert np.abs(logits_of(ONE_LAYER, attend) - base).max() > 1e-3


def bfloat16_compute_keeps_float32_logits_and_parameters_test():
    narrow = logits_of(SMALL, attend_whole(Dense(), SMALL, POSITIONS), dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32
    wide = dense_logits()
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()


@pytest.mark.slow
def gradients_of_a_bfloat16_model_are_those_of_float32_leaf_by_leaf_test():
    """With thousands of tokens an id: a sum of them in bfloat16 would be off by several percent."""
    config = dataclasses.replace(TWO_LAYERS, width=32, head_dim=16, mlp_width=64)
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (16, 512), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(512), tokens.shape)

    def gradient(dtype):
        def loss(params):
            attend = attend_whole(Dense(), config, positions)
            model = Llama(config, dtype=jnp.dtype(dtype))
            prediction = model.apply({"params": params}, tokens, attend=attend).prediction
            return token_losses(prediction, jnp.roll(tokens, -1, axis=1))[0].mean()

        return jax.jit(jax.grad(loss))(params)

    pairs = jax.tree.map(lambda *pair: pair, gradient("float32"), gradient("bfloat16"))
    for path, (exact, rounded) in jax.tree_util.tree_leaves_with_path(
        pairs, is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert rounded.dtype == jnp.float32
        error = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
        assert error < 0.03, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_heads": 3}, "4 query heads cannot share 3 KV heads"),
        ({"kv_heads": (1, 2)}, "names 2 layers, the model has 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"layers": 0, "kv_heads": 1}, "layers must be at least 1"),
    ],
)
def impossible_sizes_are_refused_test(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "config", [SMALL, dataclasses.replace(ONE_LAYER, tied_embeddings=True)], ids=["untied", "tied"]
)
def unstacked_layers_give_the_same_logits_and_records_test(config):
    params = small_params(config)
    unstacked = jax.jit(lambda p: unstack_layers(p, config, jnp.float32))(params)
    assert jax.tree.map(jnp.shape, unstack_layers(unstacked, config, jnp.float32)) == jax.tree.map(
        jnp.shape, unstacked
    )
    attend = attend_whole(DMC(DMCSettings(offset=0.0)), config, POSITIONS)
    both = [
        jax.jit(lambda p: forward(p, config, TOKENS, dtype="float32", attend=attend))(p)
        for p in (params, unstacked)
    ]
    np.testing.assert_allclose(both[0].logits, both[1].logits, atol=1e-5, rtol=0)
    appends = [
        np.concatenate([np.moveaxis(r.appends, -1, 0).ravel() for r in records])
        for records in (
            [
                jax.tree.map(operator.itemgetter(layer), stack)
                for stack in both[0].records
                for layer in range(len(stack.appends))
            ],
            both[1].records,
        )
    ]
    np.testing.assert_array_equal(*appends)
    assert len(both[1].records) == config.layers


def matrices_of_the_same_activations_are_one_in_unstacked_layers_test():
    params = small_params()
    layer, stack = unstack_layers(params, SMALL, jnp.float32)["layer_1"], params["run_0"]
    assert set(layer) == {"attention_norm", "qkv", "o", "mlp_norm", "gate_up", "down"}
    for name, parts in (("qkv", "qkv"), ("gate_up", ("gate", "up"))):
        together = np.concatenate([stack[part]["kernel"][1] for part in parts], axis=1)
        np.testing.assert_array_equal(layer[name]["kernel"], together)


def unstacked_matrices_are_narrowed_as_the_forward_pass_would_and_norms_are_not_test():
    params = small_params()
    narrow = unstack_layers(params, SMALL, jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(narrow):
        expected = jnp.float32 if path[-1].key == "scale" else jnp.bfloat16
        assert leaf.dtype == expected, path
    attend = attend_whole(Dense(), SMALL, POSITIONS)
    wide, narrow = (
        jax.jit(lambda p: forward(p, SMALL, TOKENS, dtype="bfloat16", attend=attend).logits)(p)
        for p in (params, narrow)
    )
    np.testing.assert_allclose(wide, narrow, atol=5e-3, rtol=0)
    assert np.abs(np.asarray(wide)).max() > 0.1


def stacks_that_are_given_up_are_gone_and_the_rest_stays_test():
    params = jax.tree.map(jnp.copy, small_params())
    unstacked = unstack_layers(params, SMALL, jnp.float32, give_up=True)
    stacks = [params.pop("run_0"), params.pop("run_1")]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacks))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, unstacked)))
    kept = unstack_layers(small_params(), SMALL, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, unstacked, kept)


def logits_of_one_token_a_sequence_are_those_of_all_test():
    attend, params = attend_whole(Dense(), SMALL, POSITIONS), small_params()
    inputs = {"dtype": "float32", "attend": attend}
    everything = dense_logits()
    some = jax.jit(lambda p: forward(p, SMALL, TOKENS, only=jnp.array([4, 8]), **inputs).logits)(
        params
    )
    assert some.shape == (2, 1, SMALL.vocab_size)
    np.testing.assert_allclose(some[:, 0], everything[jnp.arange(2), [4, 8]], atol=1e-6, rtol=0)
