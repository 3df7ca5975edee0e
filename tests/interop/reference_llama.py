"""A random Llama in Hugging Face's layout, and its logits by slow loops in float64."""

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    V: int = 19
    D: int = 16
    L: int = 2
    N: int = 4
    K: int = 2
    H: int = 6
    F: int = 24
    tied: bool = False


def random_weights(sizes: Sizes, dtype=ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face's names; norms are around 1, logits neither flat nor huge."""
    s, rng = sizes, np.random.default_rng(seed)

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(dtype)

    def norm():
        return (1 + 0.2 * rng.normal(size=s.D)).astype(dtype)

    weights = {"model.embed_tokens.weight": matrix(s.V, s.D)}
    for layer in range(s.L):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(s.N * s.H, s.D),
            prefix + "self_attn.k_proj.weight": matrix(s.K * s.H, s.D),
            prefix + "self_attn.v_proj.weight": matrix(s.K * s.H, s.D),
            prefix + "self_attn.o_proj.weight": matrix(s.D, s.N * s.H),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(s.F, s.D),
            prefix + "mlp.up_proj.weight": matrix(s.F, s.D),
            prefix + "mlp.down_proj.weight": matrix(s.D, s.F),
        }
    weights["model.norm.weight"] = norm()
    if not s.tied:
        weights["lm_head.weight"] = matrix(s.V, s.D)
    return weights


def with_decisions(weights: dict, sizes: Sizes, seed: int = 1) -> dict:
    """The same with decision rows of k and q that merge about a third of the tokens."""
    weights, rng = dict(weights), np.random.default_rng(seed)
    for layer in range(sizes.L):
        for name, scale in (("k", 6.0), ("q", 3.0)):
            full = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            rows = weights[full].copy()
            last = rows[sizes.H - 1 :: sizes.H]
            last[:] = (scale * rng.normal(size=last.shape) / np.sqrt(sizes.D)).astype(rows.dtype)
            weights[full] = rows
    return weights


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalised(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotated(x, position, base):
    """Pairs (f, f + H/2) by position * base^(-2f / H)."""
    half = len(x) // 2
    y = x.copy()
    for f in range(half):
        angle = position * base ** (-2 * f / len(x))
        y[f] = x[f] * np.cos(angle) - x[f + half] * np.sin(angle)
        y[f + half] = x[f + half] * np.cos(angle) + x[f] * np.sin(angle)
    return y


def visible(x, position, base):
    """As attention sees a query or key: without the last channel, before and after rotation."""
    x = x.copy()
    x[-1] = 0
    x = rotated(x, position, base)
    x[-1] = 0
    return x


def attend(query, keys, values, width):
    scores = np.array([query @ key for key in keys]) / np.sqrt(width)
    share = np.exp(scores - scores.max())
    return (share / share.sum()) @ np.array(values)


def dmc_head(q, k, v, *, base, window, offset, eps, record):
    """One KV head with its queries q [T, G, H], token by token over a cache that is really merged.

    The open slot is averaged from its last `window` tokens anew each time.
    """
    T, G, H = q.shape
    keys, values, segment, out = [], [], [], np.zeros((T, G, H))
    for t in range(T):
        logit = k[t, -1] - offset
        record.append(logit)
        importance = sigmoid(q[t, :, -1].mean() + offset) + eps
        if t > 0 and logit > 0:
            keys.pop()
            values.pop()
        else:
            segment = []
        segment.append((importance, k[t], v[t]))
        covered = segment[-window:] if window else segment
        total = sum(weight for weight, _, _ in covered)
        mean_key = sum(weight * key for weight, key, _ in covered) / total
        keys.append(visible(mean_key, t, base))
        values.append(sum(weight * value for weight, _, value in covered) / total)
        for g in range(G):
            out[t, g] = attend(visible(q[t, g], t, base), keys, values, H)
    return out


def dense_head(q, k, v, *, base, **_):
    T, G, H = q.shape
    keys = [rotated(k[t], t, base) for t in range(T)]
    out = np.zeros((T, G, H))
    for t in range(T):
        for g in range(G):
            out[t, g] = attend(rotated(q[t, g], t, base), keys[: t + 1], list(v[: t + 1]), H)
    return out


def logits(weights, sizes, tokens, *, head=dense_head, norm_eps=1e-5, **settings):
    """Logits [T, V] of one sequence; `head` is the attention of one KV head."""
    s, T = sizes, len(tokens)
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(s.L):
        p = f"model.layers.{layer}."
        y = normalised(x, w[p + "input_layernorm.weight"], norm_eps)
        q, k, v = (
            (y @ w[p + f"self_attn.{name}_proj.weight"].T).reshape(T, -1, s.H) for name in "qkv"
        )
        G = s.N // s.K
        heads = [head(q[:, h * G : (h + 1) * G], k[:, h], v[:, h], **settings) for h in range(s.K)]
        out = np.concatenate(heads, axis=1).reshape(T, -1)
        x = x + out @ w[p + "self_attn.o_proj.weight"].T
        y = normalised(x, w[p + "post_attention_layernorm.weight"], norm_eps)
        gate, up = (y @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    x = normalised(x, w["model.norm.weight"], norm_eps)
    return x @ w["model.embed_tokens.weight" if s.tied else "lm_head.weight"].T
