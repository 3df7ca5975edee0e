"""How a sequence's next token is chosen."""

import dataclasses
import json
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dmc_jax.errors import UserError

_SHOWN = 80  # characters of a bad value
MOST_LOGPROBS = 20  # tokens beside a chosen one


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue one sequence, what its cache keeps, and when to stop.

    A token must pass `top_k`, then `top_p` among those, then `min_p`. EOS ends a sequence.
    How much is merged or dropped, `ratio` or `threshold` says; without either, the engine's policy.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 0  # draw from that many most likely tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest likely tokens that have this probability together
    min_p: float = 0.0  # draw from tokens this likely, relative to the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens seen before, in the prompt too, less likely
    seed: int = 0  # with the index of a token, all that its draw depends on
    stop: tuple[str, ...] = ()  # strings that end the text, themselves not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that do, besides EOS
    ignore_eos: bool = False  # go on after it
    logprobs: int | None = None  # report each token's, and those of so many likely ones beside it
    ratio: float | None = None  # tokens per slot to come to, looked up in the engine's gates
    threshold: float | None = None  # or the logit above which a token is merged or dropped

    def __post_init__(self):
        # As JSON and command lines have them: whoever writes those knows no tuples.
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

        def require(name: str, holds: bool | np.bool_, expected: str) -> None:
            if not holds:
                raise UserError(f"{name}: expected {expected}, got {_as_json(getattr(self, name))}")

        for name in ("max_new_tokens", "top_k", "seed"):
            require(name, _is_whole(getattr(self, name)), "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            require(name, _is_number(getattr(self, name)), "a number")
        # Comparisons are written so that NaN fails them.
        require("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        require("temperature", 0 <= self.temperature < np.inf, "0 (most likely token) or more")
        require("top_k", 0 <= self.top_k < 2**31, "0 (no limit) or more")
        require("top_p", 0 < self.top_p <= 1, "a probability above 0, or 1 (no limit)")
        require("min_p", 0 <= self.min_p <= 1, "a share from 0 (no limit) to 1")
        require("repetition_penalty", 0 < self.repetition_penalty < np.inf, "more than 0; 1: none")
        require("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        require("stop", _all(self.stop, _is_text), 'a list of texts, none empty, such as ["END"]')
        require("stop_token_ids", _all(self.stop_token_ids, _is_whole), "a list of token ids")
        require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        logprobs = 0 if self.logprobs is None else self.logprobs
        known = _is_whole(logprobs) and 0 <= logprobs <= MOST_LOGPROBS
        require("logprobs", known, f"0 to {MOST_LOGPROBS} likely tokens beside each")
        for name, least, expected in (
            ("ratio", 1, "tokens per slot, 1 or more"),
            ("threshold", -np.inf, "a logit, such as 0 (even odds)"),
        ):
            value = getattr(self, name)
            require(name, value is None or (_is_number(value) and value >= least), expected)
        if self.ratio is not None and self.threshold is not None:
            raise UserError("ratio: a threshold is looked up for it; give one of the two")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _all(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(map(holds, values))


def _as_json(value: Any) -> str:
    """Show a value as who writes JSON knows it, in so many characters as a message has room for."""
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """The numbers of `SamplingParams` for B sequences, which thus share one program.

    A program does only what some of its sequences ask for, and which that is is known when it is
    compiled: a GPU that had to decide would ask the host in every step.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    draws: bool = dataclasses.field(metadata={"static": True})  # some temperature is above 0
    limits: bool = dataclasses.field(metadata={"static": True})  # and has top-k, top-p or min-p
    logprobs: bool = dataclasses.field(metadata={"static": True})  # some sequence reports them


_DTYPES = {"top_k": np.int32, "seed": np.uint32}


def stack_params(params: Sequence[SamplingParams]) -> SamplingArrays:
    """Stack the numbers, one NumPy array each; B is the length of `params`."""
    drawn = [one for one in params if one.temperature > 0]
    return SamplingArrays(
        **{
            name: np.array([getattr(one, name) for one in params], _DTYPES.get(name, np.float32))
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        },
        draws=bool(drawn),
        limits=any(one.top_k > 0 or one.top_p < 1 or one.min_p > 0 for one in drawn),
        logprobs=any(one.logprobs is not None for one in params),
    )


# ---- the next token ---------------------------------------------------------------------------


class TokenLogprob(NamedTuple):
    """How likely a token was to the model itself, whatever it was drawn by."""

    logprob: float  # nats
    likely: tuple[tuple[int, float], ...]  # ids and theirs, the likeliest first


class Chosen(NamedTuple):
    """A token for each of B sequences, and where some sequence reports them, log-probabilities."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"] | None = None
    likely: Int[Array, "B n"] | None = None  # ids, the likeliest first
    of_likely: Float[Array, "B n"] | None = None

    def logprob(self, place: int, count: int | None) -> TokenLogprob | None:
        """Say how likely one token was, from NumPy arrays.

        Args:
            place: of the sequence.
            count: of likely tokens beside it; None: it does not report them.
        """
        if count is None:
            return None
        likely = self.likely[place, :count].tolist(), self.of_likely[place, :count].tolist()
        return TokenLogprob(float(self.logprobs[place]), tuple(zip(*likely, strict=True)))


def with_logprobs(tokens: Int[Array, " B"], logits: Float[Array, "B V"]) -> Chosen:
    """Add the log-probabilities of tokens and of the likeliest ones: the log-softmax of the logits.

    Args:
        tokens: that were chosen.
        logits: of the model.
    """
    of_all = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_likely, likely = jax.lax.top_k(of_all, min(MOST_LOGPROBS, logits.shape[-1]))
    own = jnp.take_along_axis(of_all, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return Chosen(tokens, own, likely.astype(jnp.int32), of_likely)


def token_keys(seeds: UInt32[Array, " B"], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """Make the key of each sequence's token `index`, whoever else is in the batch.

    Args:
        seeds: of the sequences.
        index: 0 for the first new token.
    """
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, index)


def sample(
    logits: Float[Array, "B V"],
    params: SamplingArrays,
    keys: Key[Array, " B"],
    seen: Bool[Array, "B V"],
) -> Int[Array, " B"]:
    """Choose a token for every sequence, each by its own numbers.

    The repetition penalty r is that of CTRL (Keskar et al. 2019): a logit l of a seen token becomes
    l / r where positive and l * r elsewhere. It counts for the most likely token too.

    Args:
        logits: of the next token.
        params: how to choose.
        keys: one per sequence; unused at temperature 0.
        seen: tokens that the sequence has, those of its prompt included.

    Returns:
        The tokens; -1 where the logits are no numbers.
    """
    broken = ~jnp.isfinite(jnp.max(logits, axis=-1))
    penalty = params.repetition_penalty[:, None]
    logits = logits.astype(jnp.float32)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    greedy = jnp.argmax(logits, axis=-1)

    # The vocabulary is neither given noise nor sorted unless some sequence asks for it.
    if not params.draws:
        return jnp.where(broken, -1, greedy).astype(jnp.int32)
    drawn = params.temperature > 0
    scaled = logits / jnp.where(drawn, params.temperature, 1.0)[:, None]
    if params.limits:
        scaled = jnp.where(_kept(scaled, params), scaled, -jnp.inf)
    # Noise belongs to a token and not to its rank: two that nearly tie may change places between
    # machines without the draw of a third one changing.
    chosen = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(broken, -1, jnp.where(drawn, chosen, greedy)).astype(jnp.int32)


def _kept(logits: Float[Array, "B V"], params: SamplingArrays) -> Bool[Array, "B V"]:
    """Tokens that pass top-k, top-p and min-p; the most likely one always does."""
    B, V = logits.shape
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    top_k = jnp.where(params.top_k > 0, params.top_k, V)[:, None]
    kept = jnp.arange(V) < top_k
    p = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of the more likely ones
    top_p = params.top_p[:, None]
    # Rounding must not cut the tail where there is no limit.
    kept &= (before < top_p) | (top_p >= 1)
    kept &= p >= params.min_p[:, None] * p[:, :1]
    kept = kept.at[:, 0].set(True)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], order].set(kept)
