"""Guesses at what a sequence says next, of which one pass tries many tokens.

Whoever quotes, edits or repeats says again what was said before: the tokens that once followed the
newest ones are a draft of the next (prompt lookup decoding, Saxena 2023). A draft's token counts if
it is what would be chosen there anyway (speculative decoding, Leviathan et al. 2023, arXiv
2211.17192), which is so for drawn tokens too, since a draw depends on seed and index alone: a
sequence says what it would say without drafts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from dmc_jax.config import ModelConfig
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference.prefill import power_of_two
from dmc_jax.inference.programs import NOBODY, Batch, Tally
from dmc_jax.inference.requests import Request
from dmc_jax.inference.sampling import Chosen, stack_params
from dmc_jax.inference.text import extend_text
from dmc_jax.inference.trial import choose_each, take_tried, try_tokens
from dmc_jax.policies.policy import Policy

_LONGEST, _SHORTEST = 3, 2  # tokens that are looked for


def check_drafts(most: int, policy: Policy) -> None:
    """Refuse a length of drafts that is none, or a policy that cannot try them.

    Raises:
        UserError: it is.
    """
    if most < 0:
        raise UserError(f"prompt_lookup: expected tokens of a draft, or 0 for none, got {most}")
    if most and not policy.chunked:
        raise UserError(
            f"prompt_lookup: policy {policy.name} reads a token at a time, and cannot try a draft"
        )


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """Draft the tokens that follow: those after the latest place with the same newest ones.

    Three of these are looked for, then two.

    Args:
        tokens: all of a sequence.
        most: tokens of a draft.

    Returns:
        The draft; empty where there is no such place.
    """
    if most < 1:
        return []
    said = np.fromiter(tokens, np.int32, len(tokens))
    for n in range(_LONGEST, _SHORTEST - 1, -1):
        if len(said) > n:
            before = np.lib.stride_tricks.sliding_window_view(said[:-1], n)
            found = np.flatnonzero((before == said[-n:]).all(axis=1))
            if len(found):
                return said[found[-1] + n :][:most].tolist()
    return []


def try_drafts(
    params: Any,
    config: ModelConfig,
    batch: Batch,
    drafts: Mapping[Request, list[int]],
    *,
    tokenizer: Tokenizer,
    width: int,
    policy: Policy,
    dtype: str,
) -> tuple[Batch, Chosen, Int[np.ndarray, " B"], Tally]:
    """Give sequences as many of their next tokens as a draft foresaw, and one more.

    Args:
        params: of the model.
        config: its sizes.
        batch: given up.
        drafts: a token or more for each sequence.
        tokenizer: of their texts.
        width: of the pass in tokens, one more than a draft has at most.
        policy: that the batch was made for; of `for_requests`, if the sequences differ.
        dtype: of the forward pass.

    Returns:
        (the batch, which has read all of their tokens but the last, the tokens [B, T] after each
        that was tried, how many of these the sequences have now, the tally). A sequence may have
        `failed`.
    """
    requests = list(drafts)
    fill = power_of_two(len(requests)) - len(requests)
    nowhere = batch.cache.position.size
    seats = np.array([request.seat for request in requests] + fill * [nowhere], np.int32)
    index = np.array([len(request.tokens) for request in requests] + fill * [0], np.int32)
    sampling = stack_params([request.params for request in requests] + fill * [NOBODY])
    parts = [[request.tokens[-1], *draft] for request, draft in drafts.items()]
    cache, tried, logits = try_tokens(
        *(params, config, batch.cache, parts + fill * [[]], seats),
        width=width,
        policy=policy,
        dtype=dtype,
    )
    batch = Batch(cache, batch.seen)
    chosen = jax.device_get(choose_each(batch.seen, seats, logits, sampling, index))
    counts = np.zeros_like(index)
    for place, (request, draft) in enumerate(drafts.items()):
        counts[place] = count_taken(request, draft, chosen.tokens[place], tokenizer)
    batch, counted = take_tried(config, batch, tried, chosen.tokens, counts, seats, policy)
    return batch, chosen, counts, jax.device_get(counted)


def count_taken(
    request: Request, draft: Sequence[int], chosen: Int[np.ndarray, " T"], tokenizer: Tokenizer
) -> int:
    """Say how many tokens a sequence has more, up to the one that ends it if one does.

    Args:
        request: as it was before.
        draft: that was tried.
        chosen: after the newest token and after each of the draft.
        tokenizer: of the text.
    """
    state = request.text
    for n, token in enumerate(chosen[: len(draft) + 1].tolist(), start=1):
        if n > len(draft) or token != draft[n - 1] or token in request.stop_ids:
            return n
        if request.params.stop:
            state, _, stopped = extend_text(tokenizer, state, token, request.params.stop)
            if stopped:
                return n
    raise AssertionError("the token after a whole draft is no part of it")
