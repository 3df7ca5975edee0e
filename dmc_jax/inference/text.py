"""A sequence's text as its tokens come, and where it ends."""

import dataclasses
from collections.abc import Sequence

from dmc_jax.data.tokenizer import Tokenizer

_UNKNOWN_BYTE = "\ufffd"  # what a byte that belongs to no character decodes to
_CONTEXT = 8  # tokens whose text decides how the next one is spelt
_LONGEST_CONTEXT = 64  # tokens decoded at most, normally, for each new token


@dataclasses.dataclass(frozen=True)
class TextState:
    """Where the text of a sequence has come to."""

    ids: tuple[int, ...]  # the newest tokens: what comes next is spelt according to them
    shown: int  # characters of their text that are out, or in `pending`
    pending: str  # held back since it may begin a stop string


def begin_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> TextState:
    """Make the state after a prompt, whose text is not part of what follows.

    Args:
        tokenizer: of the ids.
        prompt: its ids, BOS included.
    """
    ids = tuple(prompt[-_CONTEXT:])
    return TextState(ids, _certain(tokenizer.decode(ids)), "")


def extend_text(
    tokenizer: Tokenizer, state: TextState, token: int, stop: Sequence[str]
) -> tuple[TextState, str, bool]:
    """Read a token.

    Args:
        tokenizer: of the ids.
        state: before the token.
        token: the new id.
        stop: strings that end the text.

    Returns:
        (the state, text that is certain now, whether a stop string ended it). The text has neither
        parts of characters nor anything of a stop string.
    """
    ids = (*state.ids, token)
    text = tokenizer.decode(ids)
    certain = max(state.shown, _certain(text))
    ready, pending, stopped = cut_at_stop(state.pending + text[state.shown : certain], stop)
    if len(ids) >= _LONGEST_CONTEXT and certain == len(text):
        # Keep the cost of a token constant. What follows a complete character is spelt the same
        # after any context that has text.
        tail = tokenizer.decode(ids[-_CONTEXT:])
        if tail:
            ids, certain = ids[-_CONTEXT:], len(tail)
    return TextState(ids, certain, pending), ready, stopped


def end_text(tokenizer: Tokenizer, state: TextState) -> str:
    """Give out what was held back, where neither a token nor a stop string follows any more."""
    return state.pending + tokenizer.decode(state.ids)[state.shown :]


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Split text at the first stop string, or where one may have begun.

    Args:
        text: what is not out yet.
        stop: strings that end the text.

    Returns:
        (text before, text held back, whether a stop string was found).
    """
    found = [text.index(end) for end in stop if end in text]
    if found:
        return text[: min(found)], "", True
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    return text[: len(text) - held], text[len(text) - held :], False


def _certain(text: str) -> int:
    """Characters that no further token changes: all but those of an incomplete one at the end."""
    # That has 3 bytes at most, each decoded as one replacement character.
    certain = len(text)
    while text[certain - 1 : certain] == _UNKNOWN_BYTE and len(text) - certain < 3:
        certain -= 1
    return certain
