"""How likely known answers are after prompts, token by token as they are given."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.model.llama import Llama
from dmc_jax.policies.policy import Policy, attend_whole

_ROUND = 128  # tokens to a multiple of which everything is padded: every width compiles


class Scored(NamedTuple):
    """An answer of A tokens."""

    nats: Float[np.ndarray, " A"]  # negative log-likelihood of each, after those before it
    first: Bool[np.ndarray, " A"]  # whether no token was likelier
    slots: float = math.nan  # of a row, on average, once all tokens but the last are read


def score_answers(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    policy: Policy,
    *,
    batch: int = 1,
    dtype: str = "float32",
    attention: CausalAttention = causal_attention,
    report: Callable[[int], None] = lambda count: None,
) -> list[Scored]:
    """Measure answers, whose tokens a policy reads as it does those of the prompt.

    What differs in the last token alone, such as the letters of a choice, is read once.

    Args:
        params: of the model, as `init_params` gives them.
        config: its sizes.
        prompts: token ids, one or more each.
        answers: the ids that follow each, one or more.
        policy: what its rows keep.
        batch: sequences at a time.
        dtype: of the forward pass.
        attention: what computes it; see `model.causal_attention`.
        report: called with how many more answers are measured, after every batch.

    Returns:
        One for each prompt.
    """
    same = collections.defaultdict(list)  # numbers of the pairs that read the same tokens
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        same[tuple(prompt), tuple(answer[:-1])].append(number)
    # The longest first: sequences of a batch are about as long as each other, and what does not fit
    # in memory shows at once.
    groups = sorted(same.items(), key=lambda group: -sum(map(len, group[0])))
    scored: dict[int, Scored] = {}
    for at in range(0, len(groups), batch):
        some = groups[at : at + batch]
        width = _rounded(max(len(prompt) + len(begun) for (prompt, begun), _ in some))
        most = _rounded(max(len(begun) + 1 for (_, begun), _ in some))
        choices = max(len(numbers) for _, numbers in some)
        # A batch that is not full is filled up: with another size it would compile anew.
        tokens, where = (np.zeros((batch, n), np.int32) for n in (width, most))
        lengths, prompted = np.zeros(batch, np.int32), np.ones(batch, np.int32)
        targets = np.zeros((batch, most, choices), np.int32)
        for row, ((prompt, begun), numbers) in enumerate(some):
            lengths[row], prompted[row] = len(prompt) + len(begun), len(prompt)
            tokens[row, : lengths[row]] = (*prompt, *begun)
            where[row, : len(begun) + 1] = len(prompt) - 1 + np.arange(len(begun) + 1)
            for choice, number in enumerate(numbers):
                targets[row, : len(begun) + 1, choice] = answers[number]
        own = policy.of_prompts(prompted)
        nats, first, slots = jax.device_get(
            _score(params, config, dtype, attention, tokens, lengths, where, targets, own)
        )
        for row, ((_, begun), numbers) in enumerate(some):
            for choice, number in enumerate(numbers):
                of_answer = row, slice(len(begun) + 1), choice
                scored[number] = Scored(nats[of_answer], first[of_answer], float(slots[row]))
        report(sum(len(numbers) for _, numbers in some))
    return [scored[number] for number in range(len(answers))]


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


@functools.partial(jax.jit, static_argnames=("config", "dtype", "attention"))
def _score(params, config, dtype, attention, tokens, lengths, where, targets, policy):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = attend_whole(policy, config, positions, attention=attention)
    output = Llama(config, dtype=jnp.dtype(dtype)).apply({"params": params}, tokens, attend=attend)
    # Of the tokens before those of the answer, and of a few at a time: all logits of a long text
    # are many.
    hidden = jnp.take_along_axis(output.prediction.hidden, where[..., None], axis=1)

    def read(part):
        hidden, targets = part
        logits = dataclasses.replace(output.prediction, hidden=hidden).logits
        target = jnp.take_along_axis(logits, targets, axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - target
        return nats, target >= logits.max(axis=-1, keepdims=True)

    parts = (x.reshape(len(x), -1, _ROUND, x.shape[-1]).swapaxes(0, 1) for x in (hidden, targets))
    read_all = (x.swapaxes(0, 1).reshape(targets.shape) for x in jax.lax.map(read, tuple(parts)))
    taken = sum(record.appends.sum(axis=(0, 3)) for record in output.records)  # [B, T]
    slots = jnp.sum(taken * (positions < lengths[:, None]), axis=1) / config.kv_rows
    return *read_all, slots
