"""Methods beside the dense model on the same windows: how far off, and how many slots.

Every window is one sequence, alone in a cache. Slots are counted after every token, over all rows
on average: what a row holds on average over a window (a dense one: half the window and a half) and
what it holds at the end, which is the most where rows only grow.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dmc_jax.checkpoints.gates import StoredGates
from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.core.losses import token_losses
from dmc_jax.data.loader import windows
from dmc_jax.data.prepared import PreparedData
from dmc_jax.errors import UserError
from dmc_jax.evaluation.tables import table
from dmc_jax.model.causal_attention import over_int8
from dmc_jax.model.llama import Llama
from dmc_jax.policies.budget import LEAST
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.h2o import H2O
from dmc_jax.policies.policy import Policy, attend_whole
from dmc_jax.policies.snapkv import SnapKV
from dmc_jax.policies.stride import Stride
from dmc_jax.policies.tova import TOVA
from dmc_jax.policies.window import Window

# What needs no gates; of the second kind what cuts a prompt, so that there must be one.
OTHERS = {"TOVA": TOVA, "H2O": H2O, "StreamingLLM": Window, "Stride": Stride}
OF_PROMPTS = {"SnapKV": SnapKV}
PAGES = "float32", "int8"  # dtypes of pages that are set beside each other
_READ = ("tokens", "targets", "positions")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy over W windows of T tokens."""

    nats: Float[np.ndarray, "W T"]  # of every token that came
    apart: Float[np.ndarray, "W T"]  # KL(dense || policy) of every prediction, in nats
    slots: Float[np.ndarray, "W T"]  # of a row after every token, on average
    hidden: Float[np.ndarray, "W T D"]  # what predictions are made of

    def rises(self, dense: "Measured") -> Float[np.ndarray, "W"]:
        """Say how many nats a token it loses to the dense model, window by window."""
        return (self.nats - dense.nats).mean(axis=1)

    def figures(self, dense: "Measured") -> dict[str, float | list[float]]:
        """Sum it up against the dense model, window by window.

        Args:
            dense: the same windows by `Dense`.

        Returns:
            Means over windows, and the `interval` of each as [low, high].
        """
        T = self.nats.shape[1]
        rises, apart = self.rises(dense), self.apart.mean(axis=1)
        mean, end = self.slots.mean(), self.slots[:, -1].mean()
        found = {
            "mean_slots": mean,
            "end_slots": end,
            "ratio_of_means": (T + 1) / 2 / mean,
            "ratio_at_end": T / end,
            "perplexity_percent": 100 * math.expm1(rises.mean()),
            "perplexity_percent_interval": 100 * np.expm1(interval(rises)),
            "divergence": apart.mean(),
            "divergence_interval": interval(apart),
        }
        return {name: np.round(x, 4).tolist() for name, x in found.items()}


def interval(values: Float[np.ndarray, "W"]) -> tuple[float, float]:
    """Bootstrap the mean over windows: where 95 % of the means of windows drawn anew lie.

    Of one window: NaN. The draws are the same each time.
    """
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.stats import bootstrap  # half a second, which most doors need not wait

    drawn = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return tuple(map(float, drawn.confidence_interval))


def single_windows(
    data: PreparedData, split: str, length: int, count: int
) -> dict[str, Int[np.ndarray, "W T"]]:
    """Take windows that lie in one document each, from all over a split.

    Args:
        data: from `open_data`.
        split: of it.
        length: tokens a window.
        count: windows at most.

    Raises:
        UserError: no document has so many tokens.
    """
    found = windows(data, split, length)
    whole = [w for w in map(found.__getitem__, range(len(found))) if w["segment_ids"].max() == 1]
    if not whole:
        raise UserError(f"{data.path}: no document of {split} fills a window of {length} tokens")
    at = np.unique(np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int))
    return {name: np.stack([whole[i][name] for i in at]) for name in _READ}


def measure(
    params: Any,
    config: ModelConfig,
    some: dict[str, Int[np.ndarray, "W T"]],
    policy: Policy,
    *,
    batch: int = 1,
    dense: Measured | None = None,
    attention: CausalAttention = causal_attention,
) -> Measured:
    """Run a model over windows with a policy.

    Args:
        params: of the model, in float32.
        config: its sizes.
        some: from `single_windows`.
        policy: what its rows keep.
        batch: windows at a time.
        dense: what this gave for the same windows by `Dense`; None: that is run first.
        attention: what computes the attention itself; see `model.causal_attention`.
    """
    if dense is None and not isinstance(policy, Dense):
        dense = measure(params, config, some, Dense(), batch=batch)
    got = []
    for at in range(0, len(some["tokens"]), batch):
        part = {name: x[at : at + batch] for name, x in some.items()}
        taught = None if dense is None else dense.hidden[at : at + batch]
        got.append(jax.device_get(_measure(params, config, part, policy, taught, attention)))
    nats, apart, slots, hidden = (np.concatenate(x) for x in zip(*got, strict=True))
    return Measured(nats, apart, slots / config.kv_rows, hidden)


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def _measure(params, config, batch, policy, taught, attention):
    attend = attend_whole(policy, config, batch["positions"], attention=attention)
    output = Llama(config).apply({"params": params}, batch["tokens"], attend=attend)
    prediction = output.prediction
    teacher = None if taught is None else dataclasses.replace(prediction, hidden=taught)
    nats, apart = token_losses(prediction, batch["targets"], teacher)
    taken = sum(record.appends.sum(axis=(0, 3)) for record in output.records)  # [B, T]
    return nats, apart, jnp.cumsum(taken, axis=1), prediction.hidden


def budget_of_mean(slots: float, length: int) -> int:
    """Find the fixed budget of which a row holds so many slots on average over a window.

    The mean of min(t, b) over t = 1 .. T is b - b (b - 1) / 2T.

    Args:
        slots: on average.
        length: T.
    """
    half = length + 0.5
    return max(1, round(half - math.sqrt(max(half**2 - 2 * length * slots, 0.0))))


def others_like(name: str, row: dict[str, Any]) -> dict[str, Policy]:
    """Give a method that needs no gates as many slots as something else was measured to hold.

    Args:
        name: of `OTHERS` or `OF_PROMPTS`; these get the slots at the end of a prompt.
        row: of `Measured.figures`, or some of it: without `end_slots` there is no "end", without
            `mean_slots` and a `length` no "mean".

    Returns:
        "grows": after every token as many as tokens over the ratio at the end. Of a method that can
        be held to a number of slots also "end": as many as there are at the end; and "mean": so
        many that there are as many on average.
    """
    method, ratio = (OTHERS | OF_PROMPTS)[name], row["ratio_at_end"]
    if method is Stride:
        return {"grows": Stride(ratio)}
    like = {"grows": method(LEAST, ratio=ratio)}
    if "end_slots" in row and name in OTHERS:
        like["end"] = method(round(row["end_slots"]))
    if "mean_slots" in row:
        like["mean"] = method(budget_of_mean(row["mean_slots"], row["length"]))
    return like


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put windows of several texts together."""
    return {name: np.concatenate([part[name] for part in parts]) for name in _READ}


def beside_others(
    params: Any,
    config: ModelConfig,
    some: dict[str, Int[np.ndarray, "W T"]],
    gates: StoredGates,
    ratios: Sequence[float],
    *,
    batch: int = 1,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure gates, and what needs none at as many slots.

    Args:
        params: as in `measure`.
        config: as there.
        some: as there.
        gates: made for this model.
        ratios: tokens per slot to ask them for.
        batch: as there.
        report: called with a line before each method.

    Returns:
        For the dense model, and for each ratio and method: its name ("ours": with the gates),
        `length`, what was `asked`, the others' `budget` ("grows": after every token as many as
        tokens over the ratio that the gates came to; "fixed", which a stride cannot have: as many
        as they hold at the end), `Measured.figures`, and the float32 `cache_bytes` at the end of a
        window.

    Raises:
        UserError: a ratio that the gates were not measured at.
    """
    length = some["tokens"].shape[1]
    run = {"params": params, "config": config, "some": some, "batch": batch}
    dense = measure(**run, policy=Dense())
    rows = [{"length": length, "method": "dense"} | dense.figures(dense)]

    def add(policy: Policy, **about) -> None:
        figures = measure(**run, policy=policy, dense=dense).figures(dense)
        rows.append({"length": length} | about | figures)

    for ratio in ratios:
        report(f"{length:,} tokens, {ratio:g}x: ours ...")
        add(gates.at(ratio), method="ours", asked=ratio)
        ours = rows[-1]
        for name in OTHERS:
            report(f"{length:,} tokens, {ratio:g}x: {name} ...")
            like, about = others_like(name, ours), {"method": name, "asked": ratio}
            add(like["grows"], **about, budget="grows")
            if "end" in like:
                add(like["end"], **about, budget="fixed")
    each = slot_bytes(config)
    return [row | {"cache_bytes": round(row["end_slots"] * each)} for row in rows]


def slot_bytes(config: ModelConfig, kv_dtype: str = "float32") -> int:
    """Bytes of a key and a value in every row of a model, with their scales if they are of int8."""
    a_vector = config.head_dim + 4 if kv_dtype == "int8" else 4 * config.head_dim
    return 2 * a_vector * config.kv_rows


def attention_over(kv_dtype: str) -> CausalAttention:
    """Give what attends over slots as pages of a dtype of `PAGES` hold them."""
    return over_int8(causal_attention) if kv_dtype == "int8" else causal_attention


def growing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take those of `beside_others` whose slots grow with the text: a method once a ratio."""
    return [row for row in rows if row.get("budget") != "fixed"]


def side_by_side_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out what `beside_others` measured, as a Markdown table."""
    fixed = {_case(row): row for row in rows if row.get("budget") == "fixed"}
    lines = [
        (
            f"{row['length']:,}",
            row["method"],
            f"{row['ratio_at_end']:.2f}x",
            f"{row['cache_bytes'] / 1e6:.1f} MB",
            *_quality(row),
            *_quality(fixed.get(_case(row))),
        )
        for row in growing(rows)
    ]
    header = ["tokens", "method", "tokens per slot", "cache", "divergence (nats)", "perplexity"]
    header += ["divergence, fixed budget", "perplexity, fixed budget"]
    return table(header, lines, left=("method",))


def _case(row: dict[str, Any]) -> tuple:
    return row["length"], row.get("asked"), row["method"]


def _quality(row: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{row['divergence']:.3f}", f"{row['perplexity_percent']:+.1f} %") if row else ("", "")
