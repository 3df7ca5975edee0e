"""A sequence's text as its tokens come, and where it ends."""

import dataclasses
import itertools
import operator
from collections.abc import Sequence

from dmc_jax.data.tokenizer import Tokenizer

_UNKNOWN_BYTE = "\ufffd"  # what a byte that belongs to no character decodes to
_CONTEXT = 8  # tokens whose text decides how the next one is spelt
_LONGEST_CONTEXT = 64  # tokens decoded at most, normally, for each new token


@dataclasses.dataclass(frozen=True)
class TextState:
    """Where the text of a sequence has come to."""

    ids: tuple[int, ...]  # the newest tokens: what comes next is spelt according to them
    shown: int  # characters of their text that are out, in `pending` or the prompt's
    pending: str  # held back since it may begin a stop string
    echo: str = ""  # the prompt's text after `shown`, which what follows may change or not


def begin_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> TextState:
    """Make the state after a prompt, whose text is not part of what follows.

    Args:
        tokenizer: of the ids.
        prompt: its ids, BOS included.
    """
    closed = _closed(tokenizer, prompt)
    size = _CONTEXT
    # A decoder may strip the space before its first word: there must be text before that.
    while not (before := tokenizer.decode(prompt[max(0, closed - size) : closed])):
        if size >= closed:
            break
        size *= 2
    ids = tuple(prompt[max(0, closed - size) :])
    text = tokenizer.decode(ids)
    certain = _certain(text) if closed == len(prompt) else _common(before, text)
    return TextState(ids, certain, "", text[certain:])


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
        parts of characters nor anything of a stop string. Over all tokens it joins to what decoding
        the prompt with them gives after that of the prompt.
    """
    ids = (*state.ids, token)
    if _in_byte_run(tokenizer, token):
        return dataclasses.replace(state, ids=ids), "", False
    text = tokenizer.decode(ids)
    certain = max(state.shown, _certain(text))
    new, echo = _without_echo(text[state.shown : certain], state.echo)
    echo = "" if certain == len(text) else echo
    ready, pending, stopped = cut_at_stop(state.pending + new, stop)
    if len(ids) >= _LONGEST_CONTEXT and certain == len(text):
        # Keep the cost of a token constant. What follows a complete character is spelt the same
        # after any context that has text.
        tail = tokenizer.decode(ids[-_CONTEXT:])
        if tail:
            ids, certain = ids[-_CONTEXT:], len(tail)
    return TextState(ids, certain, pending, echo), ready, stopped


def end_text(tokenizer: Tokenizer, state: TextState) -> str:
    """Give out what was held back, where no token follows any more. It may hold a stop string."""
    rest, _ = _without_echo(tokenizer.decode(state.ids)[state.shown :], state.echo)
    return state.pending + rest


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


def _in_byte_run(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token's text is decided by the whole run of such tokens, so when that has ended."""
    # Only some tokenizers have such runs, and they say so.
    tells = getattr(tokenizer, "in_byte_run", None)
    return tells is not None and tells(token)


def _closed(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Count the tokens before the run of bytes at the end."""
    count = len(ids)
    while count and _in_byte_run(tokenizer, ids[count - 1]):
        count -= 1
    return count


def _without_echo(text: str, echo: str) -> tuple[str, str]:
    """Take from new text what the prompt showed already; also what is left of that."""
    same = _common(text, echo)
    return text[same:], echo[same:] if same == len(text) else ""


def _common(one: str, other: str) -> int:
    """Count the characters that two texts begin with alike."""
    same = itertools.takewhile(bool, map(operator.eq, one, other))
    return sum(1 for _ in same)
