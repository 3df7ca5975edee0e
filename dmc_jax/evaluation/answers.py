"""How likely known answers are after prompts, token by token as they are given."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.model.llama import Llama
from dmc_jax.policies.policy import Policy, attend_whole

_ROUND = 128  # tokens to a multiple of which everything is padded: every width compiles


class Scored(NamedTuple):
    """An answer of A tokens."""

    nats: Float[np.ndarray, " A"]  # negative log-likelihood of each, after those before it
    first: Bool[np.ndarray, " A"]  # whether no token was likelier


def score_answers(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    policy: Policy,
    *,
    batch: int = 1,
) -> list[Scored]:
    """Measure answers, whose tokens a policy reads as it does those of the prompt.

    Args:
        params: of the model, as `init_params` gives them.
        config: its sizes.
        prompts: token ids, one or more each.
        answers: the ids that follow each, one or more.
        policy: what its rows keep.
        batch: sequences at a time.

    Returns:
        One for each prompt.
    """
    scored = []
    for at in range(0, len(prompts), batch):
        pairs = list(zip(prompts[at : at + batch], answers[at : at + batch], strict=True))
        width = _rounded(max(len(prompt) + len(answer) for prompt, answer in pairs))
        most = _rounded(max(len(answer) for _, answer in pairs))
        # A batch that is not full is filled up: with another size it would compile anew.
        tokens, where, targets = (np.zeros((batch, n), np.int32) for n in (width, most, most))
        lengths = np.ones(batch, np.int32)
        for row, (prompt, answer) in enumerate(pairs):
            lengths[row] = len(prompt)
            tokens[row, : len(prompt) + len(answer)] = (*prompt, *answer)
            where[row, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
            targets[row, : len(answer)] = answer
        own = policy.of_prompts(lengths)
        nats, first = jax.device_get(score_at(params, config, tokens, where, targets, own))
        for row, (_, answer) in enumerate(pairs):
            scored.append(Scored(nats[row, : len(answer)], first[row, : len(answer)]))
    return scored


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


@functools.partial(jax.jit, static_argnames="config")
def score_at(
    params: Any,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    where: Int[Array, "B A"],
    targets: Int[Array, "B A"],
    policy: Policy,
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Measure what follows some tokens of sequences.

    Args:
        params: as in `score_answers`.
        config: as there.
        tokens: ids.
        where: places of tokens.
        targets: the id that should follow each.
        policy: as there.

    Returns:
        As `Scored`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = attend_whole(policy, config, positions)
    prediction = Llama(config).apply({"params": params}, tokens, attend=attend).prediction
    # Of the tokens before those of the answer: all logits of a long prompt are many.
    hidden = jnp.take_along_axis(prediction.hidden, where[..., None], axis=1)
    logits = dataclasses.replace(prediction, hidden=hidden).logits
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target, target >= logits.max(axis=-1)
