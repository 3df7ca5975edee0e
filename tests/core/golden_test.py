"""The released implementation's numbers (tests/data/README.md), reproduced array by array."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core import dmc
from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.losses import compression_loss
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.core.schedules import compression_target, decision_channel_scale

DATA = Path(__file__).parents[1] / "data"
ABSOLUTE = 1e-5  # float32 values
RELATIVE = 1e-4  # float32 gradients, of the largest entry
ROUNDING = 3e-6  # where the exact gradient is 0 (W = 1: the importance cancels), both sides round
# bfloat16 files: the released code rounds every operation, ours computes in float32 on its inputs.
BF16 = {"out": 0.01, "pooled": 0.025, "omega": 0.006, "logits": 0.3, "mean": 0.004}
FLOAT32 = {"out": 1e-5, "pooled": 1e-5, "omega": 1e-5, "logits": 1e-4, "mean": 1e-6}


def files(pattern):
    paths = sorted(DATA.glob(pattern))
    assert paths, f"no reference files {pattern} in {DATA}"
    return [pytest.param(path, id=path.stem) for path in paths]


def load(path):
    """The arrays of a file, batch first: [L, B, ...] becomes [B, L, ...]."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    time_first = {"q", "k", "v", "g1", "g2", "logits", "alpha", "decision", "omega", "pooled_k"}
    time_first |= {"pooled_v", "key_mask", "dq", "dk", "dv", "dk_decision", "slot", "cache_len"}
    time_first |= {"seg_len", "omega_sum", "k_slot", "out", "proj", "eval_out", "q_rot", "k_rot"}
    arrays = {n: np.swapaxes(a, 0, 1) if n in time_first else a for n, a in arrays.items()}
    return {n: jnp.asarray(a) if n in time_first else a for n, a in arrays.items()}


def close(actual, expected, tolerance=ABSOLUTE):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def close_gradient(actual, expected):
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=RELATIVE * scale + ROUNDING)


def settings_of(file, **kwargs):
    return DMCSettings(
        window=int(file["window"]),
        offset=float(file["c"]),
        eps=float(file["eps"]),
        temperature=float(file.get("temp", 0.1)),
        **kwargs,
    )


def positions_of(file):
    B, L = file["q"].shape[:2]
    return jnp.broadcast_to(jnp.arange(L), (B, L))


def heads_joined(x):
    return x.reshape(*x.shape[:2], -1)


def run_dmc(file, q, k, v, noise=None):
    """`dmc_attention` on a file's inputs, in blocks small enough that several meet."""
    run = functools.partial(
        dmc.dmc_attention,
        positions=positions_of(file),
        rope_theta=float(file["rope_base"]),
        settings=settings_of(file),
        attention=functools.partial(causal_attention, block=16),
    )
    return jax.jit(run)(q, k, v, noise=noise)


# ---- pooling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files("pool_*.npz"))
def pooling_and_its_gradients_match_test(path):
    with np.load(path) as archive:
        file = {name: archive[name] for name in archive.files}
    T, N, _ = file["x"].shape
    weights = file.get("w", np.ones((T, N), np.float32))

    @jax.jit
    def pooled(x, b, w):
        alpha = jnp.concatenate([jnp.ones((1, N)), b])  # alpha_0 = 1 must be ignored
        return dmc.pool(x[None], alpha[None], w[None], int(file["window"]))[0]

    close(pooled(file["x"], file["b"], weights), file["y"])
    gradient = jax.grad(lambda *a: jnp.sum(pooled(*a) * file["proj"]), argnums=(0, 1, 2))
    gradients = jax.jit(gradient)(file["x"], file["b"], weights)
    for name, gradient in zip(("dx", "db", "dw"), gradients, strict=True):
        if name in file:
            close_gradient(gradient, file[name])


# ---- the training path ------------------------------------------------------------------------


@pytest.mark.parametrize("path", files("train_attn_*.npz"))
def training_path_matches_test(path):
    file = load(path)
    q, k, v = (jnp.asarray(file[n]) for n in "qkv")
    noise = jnp.asarray(file["g1"] - file["g2"])
    result = run_dmc(file, q, k, v, noise)
    tolerance = BF16 if "bf16" in path.stem else FLOAT32
    check_states(file, q, k, result, tolerance)

    settings = settings_of(file)
    logits = (dmc.merge_logits(k, settings) + noise) / settings.temperature
    close(logits, file["logits"], tolerance["logits"])
    if tolerance is BF16:  # decisions and masks follow from logits that were rounded to 8 bits
        return
    close(dmc.relaxed_decisions(dmc.merge_logits(k, settings), noise, settings)[0], file["alpha"])
    np.testing.assert_array_equal(result.decisions, file["decision"])
    np.testing.assert_array_equal(result.merged[:, 0], 0)
    np.testing.assert_array_equal(result.merged[:, 1:], file["decision"][:, 1:])
    close(result.key_bias, file["key_mask"], tolerance["logits"])
    check_rotation(file, q, result.pooled_k)


def check_states(file, q, k, result, tolerance):
    close(dmc.importance(q, k.shape[2], settings_of(file)), file["omega"], tolerance["omega"])
    close(result.pooled_k, file["pooled_k"], tolerance["pooled"])
    close(result.pooled_v, file["pooled_v"], tolerance["pooled"])
    close(heads_joined(result.out), file["out"], tolerance["out"])
    close(result.decisions.mean(axis=(1, 2)), file["decision_mean"], tolerance["mean"])


def check_rotation(file, q, pooled_k):
    """Rotated queries and keys, without the reference's use of the last channel for the bias."""
    D = q.shape[-1]
    frequencies = rotary_frequencies(D, float(file["rope_base"]))
    for x, name, scale in ((q, "q_attn", D**-0.5), (pooled_k, "k_attn", 1.0)):
        rotated = dmc.rotate_for_attention(x, positions_of(file), frequencies) * scale
        np.testing.assert_array_equal(rotated[..., -1], 0)
        close(rotated[..., :-1], file[name].transpose(0, 2, 1, 3)[..., :-1])


@pytest.mark.parametrize("path", [p for p in files("train_attn_*.npz") if "bf16" not in p.id])
def training_gradients_match_test(path):
    file = load(path)
    noise = jnp.asarray(file["g1"] - file["g2"])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k, v):
        return jnp.sum(heads_joined(run_dmc(file, q, k, v, noise).out) * file["proj"])

    for name, actual in zip(
        ("dq", "dk", "dv"), gradient(file["q"], file["k"], file["v"]), strict=True
    ):
        close_gradient(actual, file[name])

    @jax.jit
    @jax.grad
    def decision_gradient(k):
        means = run_dmc(file, file["q"], k, file["v"], noise).decisions.mean(axis=(1, 2))
        return jnp.sum(means * (1 + jnp.arange(len(means))))

    actual = decision_gradient(jnp.asarray(file["k"]))
    np.testing.assert_array_equal(actual[..., :-1], 0)
    close_gradient(actual[..., -1], file["dk_decision"])


# ---- the evaluation path ----------------------------------------------------------------------


@pytest.mark.parametrize("path", files("eval_attn_*.npz"))
def evaluation_path_matches_test(path):
    file = load(path)
    q, k, v = (jnp.asarray(file[n]) for n in "qkv")
    result = run_dmc(file, q, k, v)
    tolerance = BF16 if "bf16" in path.stem else FLOAT32
    check_states(file, q, k, result, tolerance)
    np.testing.assert_array_equal(result.decisions, file["decision"])
    # -50000 is not a bfloat16; both mean "never".
    np.testing.assert_array_equal(result.key_bias < -40_000, file["key_mask"] < -40_000)
    if tolerance is FLOAT32:
        close(dmc.merge_logits(k, settings_of(file)), file["logits"])
        close(result.key_bias, file["key_mask"])
        check_rotation(file, q, result.pooled_k)


@pytest.mark.slow
def unlimited_window_equals_one_longer_than_the_text_test():
    file = load(DATA / "eval_attn_mha_nowin.npz")
    alpha = np.random.default_rng(0).uniform(size=file["omega"].shape)
    alpha = jnp.asarray(alpha, jnp.float32)
    L = alpha.shape[1]
    for window in (None, 0):
        close(
            dmc.pool(file["k"], alpha, file["omega"], window),
            dmc.pool(file["k"], alpha, file["omega"], L),
        )


# ---- one token at a time ----------------------------------------------------------------------


@pytest.mark.parametrize("path", files("infer_*.npz"))
def step_form_matches_cached_decoding_test(path):
    """States, slots and cache of the recursion; attention over the cache by plain NumPy."""
    file = load(path)
    # f16state keeps sums in float16; bf16 also rounds inputs, angles and cache.
    state_tolerance, out_tolerance = ABSOLUTE, ABSOLUTE
    if "f16state" in path.stem:
        state_tolerance, out_tolerance = 2e-2, 4e-3
    if path.stem.endswith("_bf16"):
        state_tolerance, out_tolerance = 0.05, 0.02
    q, k, v = file["q"], file["k"], file["v"]
    B, L, K, D = k.shape
    G = q.shape[2] // K
    settings = settings_of(file)
    omega = np.asarray(dmc.importance(q, K, settings))
    decisions = np.asarray(dmc.hard_decisions(dmc.merge_logits(k, settings)))
    frequencies = rotary_frequencies(D, float(file["rope_base"]))
    positions = positions_of(file)
    queries = np.asarray(dmc.rotate_for_attention(q, positions, frequencies))
    queries = queries.reshape(B, L, K, G, D) * D**-0.5

    @jax.jit
    def step(segment, t, k_t, v_t, decision, omega):
        segment, k_bar, v_bar = dmc.merge_step(
            segment, dmc.without_decision_channel(k_t), v_t, decision, omega, settings.window
        )
        at = jnp.full((B, 1), t)
        rotated = dmc.rotate_for_attention(k_bar[:, None], at, frequencies)[:, 0]
        return segment, k_bar, v_bar, rotated

    segment = dmc.empty_segment((B, K), D, settings.window, jnp.float32)
    cache_k, cache_v = np.zeros((2, B, K, L, D), np.float32)
    slot = np.full((B, K), -1)
    rows = np.ix_(np.arange(B), np.arange(K))
    for t in range(L):
        segment, k_bar, v_bar, k_slot = step(
            segment, t, k[:, t], v[:, t], decisions[:, t], omega[:, t]
        )
        slot = slot + (1 - decisions[:, t].astype(int) if t else 1)
        np.testing.assert_array_equal(slot, file["slot"][:, t])
        np.testing.assert_array_equal(slot + 1, file["cache_len"][:, t])
        np.testing.assert_array_equal(segment.count, file["seg_len"][:, t])
        close(segment.weights.sum(-1), file["omega_sum"][:, t], state_tolerance)
        close(k_bar, file["pooled_k"][:, t], state_tolerance)
        close(v_bar, file["pooled_v"][:, t], state_tolerance)
        close(k_slot, file["k_slot"][:, t], state_tolerance)
        cache_k[(*rows, slot)], cache_v[(*rows, slot)] = k_slot, v_bar
        scores = np.einsum("bkgd,bksd->bkgs", queries[:, t], cache_k)
        scores = np.where(np.arange(L) <= slot[:, :, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("bkgs,bksd->bkgd", weights, cache_v) / weights.sum(-1, keepdims=True)
        close(out.reshape(B, -1), file["out"][:, t], out_tolerance)
    S = file["cache_k"].shape[2]
    close(cache_k[:, :, :S], file["cache_k"], state_tolerance)
    close(cache_v[:, :, :S], file["cache_v"], state_tolerance)


@pytest.mark.parametrize("path", files("infer_*.npz"))
def parallel_form_equals_cached_decoding_test(path):
    file = load(path)
    result = run_dmc(file, *(jnp.asarray(file[n]) for n in "qkv"))
    tolerance = BF16 if path.stem.endswith("_bf16") else FLOAT32
    close(heads_joined(result.out), file["eval_out"], tolerance["out"])
    slots = jnp.cumsum(1 - result.merged, axis=1) - 1
    np.testing.assert_array_equal(slots, file["slot"])


# ---- loss, schedule, stage one ----------------------------------------------------------------


def compression_loss_and_schedule_match_test():
    with np.load(DATA / "loss_sched.npz") as archive:
        file = {name: archive[name] for name in archive.files}
    probabilities = jnp.asarray(file["probs"])
    N, CR = int(file["train_iters"]), float(file["target_cr"])

    def loss(probabilities, prior):
        hard = (probabilities > 0.5).astype(jnp.float32)
        decisions = hard + probabilities - jax.lax.stop_gradient(probabilities)
        return compression_loss(decisions.mean(axis=(1, 3)), prior)

    hard = (probabilities > 0.5).mean(axis=(1, 3))
    close(hard, file["decisions_mean"], 1e-6)
    for i, iteration in enumerate(file["loss_iters"]):
        ratio, prior = compression_target(int(iteration), N, CR)
        close(ratio, file["tgt_cr"][i])
        close(prior, file["tgt_prior"][i])
        value, gradient = jax.value_and_grad(loss)(probabilities, prior)
        close(value, file["loss"][i])
        close(gradient, file["dprobs"][i], 1e-7)
        close(1 / (1 - hard.mean()), file["curr_cr"][i])
    for (CR, N, fixed, iteration), ratio, prior in zip(
        file["sched_args"], file["sched_cr"], file["sched_prior"], strict=True
    ):
        # Fixed target: the end of the ramp. "Iteration not known" is -1, which clips to 0.
        step = N if fixed and iteration >= 0 else iteration
        actual = compression_target(int(step), int(N), float(CR))
        close(actual[0], ratio)
        close(actual[1], prior)


@pytest.mark.parametrize("path", files("stage1_*.npz"))
def zero_out_stage_matches_test(path):
    file = load(path)
    scale = decision_channel_scale(int(file["iteration"]), int(file["train_iters"]))
    close(scale, file["mult"], 1e-6)
    for iteration, expected in zip(file["mult_iters"], file["mult_table"], strict=True):
        close(decision_channel_scale(int(iteration), int(file["train_iters"])), expected, 1e-6)

    @jax.jit
    def attend(q, k, v):
        out = dmc.dense_attention(
            q, k, v,
            positions=positions_of(file),
            rope_theta=float(file["rope_base"]),
            channel_scale=scale,
            attention=functools.partial(causal_attention, block=16),
        )  # fmt: skip
        return heads_joined(out)

    q, k, v = (jnp.asarray(file[n]) for n in "qkv")
    close(attend(q, k, v), file["out"])
    gradient = jax.grad(lambda *a: jnp.sum(attend(*a) * file["proj"]), argnums=(0, 1, 2))
    gradients = jax.jit(gradient)(q, k, v)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        close_gradient(gradient, file[name])
