"""Text comes whole and ends in time."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.inference.text import begin_text, end_text, extend_text


class Bytes:
    """A token per byte."""

    vocab_size, bos_id, eos_id, pad_id = 256, 256, 257, 258

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def parts_of(prompt, tokens, stop=()):
    state, parts = begin_text(Bytes(), prompt), []
    for token in tokens:
        state, part, stopped = extend_text(Bytes(), state, token, stop)
        parts.append(part)
        if stopped:
            return parts, True
    return [*parts, end_text(Bytes(), state)], False


@settings(max_examples=60, deadline=None)
@given(st.text("aé€😀b", max_size=90), st.text("a€", max_size=9))
def parts_are_whole_characters_and_join_to_the_text_test(text, prompt):
    parts, stopped = parts_of([Bytes.bos_id, *prompt.encode()], text.encode())
    assert "".join(parts) == text and not stopped
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab€", max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3),
)
def text_ends_before_the_first_stop_string_that_is_complete_test(text, stop):
    parts, stopped = parts_of([Bytes.bos_id], text.encode(), stop)
    complete = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))]
    assert stopped == bool(complete)
    expected = text
    if complete:
        upto = text[: complete[0]]
        expected = upto[: min(len(upto) - len(end) for end in stop if upto.endswith(end))]
    assert "".join(parts) == expected


def text_that_may_begin_a_stop_string_is_held_back_until_it_cannot_test():
    parts, _ = parts_of([Bytes.bos_id], b"xENxEND", ("END",))
    assert parts == ["x", "", "", "ENx", "", "", ""]


def an_incomplete_character_at_the_end_is_shown_as_such_test():
    parts, _ = parts_of([Bytes.bos_id], "a€".encode()[:-1])
    assert parts == ["a", "", "", "\ufffd"]
