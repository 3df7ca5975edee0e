"""Two checkpoints, token by token: how far their logits are apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmc_jax.errors import UserError
from dmc_jax.interop.parameters import read_params
from dmc_jax.interop.source import Source
from dmc_jax.model.llama import Llama
from dmc_jax.policies.policy import attend_whole


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` measured over the positions of a prompt."""

    largest: float  # difference between two logits
    mean: float  # of the differences' magnitudes
    agreement: float  # fraction of positions with the same most likely token
    divergence: Float[np.ndarray, " T"]  # KL(first || second) in nats


def compare(first: list[np.ndarray], second: list[np.ndarray]) -> list[Comparison]:
    """Compare logits of two models, prompt by prompt.

    Args:
        first: float32 logits [T, V] of each prompt.
        second: the same of the other model.
    """
    return [_compare(a, b) for a, b in zip(first, second, strict=True)]


def logits_of(source: Source, prompts: list[list[int]]) -> list[Float[np.ndarray, "T V"]]:
    """Logits of a checkpoint in float32, dense or with the decisions of inference.

    Args:
        source: the checkpoint, read here and let go afterwards.
        prompts: token ids, BOS included.

    Raises:
        UserError: a prompt is empty, too long or has an id that the model does not know.
    """
    for prompt in prompts:
        _check_prompt(source, prompt)
    params = read_params(source)
    policy = source.policy if source.gates is None else source.gates.policy
    # Padded to one length, so that one program serves all: nothing looks at what comes later.
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = []
    for row, prompt in zip(tokens, prompts, strict=True):
        padded = _forward(source.config, params, policy, row[None])
        logits.append(np.asarray(padded[0, : len(prompt)]))
    return logits


@functools.partial(jax.jit, static_argnames="config")
def _forward(config, params, policy, tokens):
    attend = attend_whole(policy, config, jnp.arange(tokens.shape[1])[None])
    return Llama(config).apply({"params": params}, tokens, attend=attend).logits


def _compare(a: Float[np.ndarray, "T V"], b: Float[np.ndarray, "T V"]) -> Comparison:
    apart = np.abs(a.astype(np.float64) - b)
    log_a, log_b = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (a, b))
    divergence = (np.exp(log_a) * (log_a - log_b)).sum(axis=-1)
    return Comparison(
        largest=float(apart.max()),
        mean=float(apart.mean()),
        agreement=float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean()),
        divergence=np.maximum(divergence, 0.0),  # rounding may take it below
    )


def _check_prompt(source: Source, prompt: list[int]) -> None:
    if not prompt:
        raise UserError("the prompt has no token: give some text")
    strange = [token for token in prompt if not 0 <= token < source.config.vocab_size]
    if strange:
        raise UserError(
            f"the prompt has token {strange[0]}, but {source.path} knows ids 0 to "
            f"{source.config.vocab_size - 1}: use its own tokenizer"
        )
    if len(prompt) > source.config.max_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, {source.path} is for "
            f"{source.config.max_length}: shorten it"
        )
