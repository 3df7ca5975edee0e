"""Text comes whole and ends in time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from dmc_jax.inference.text import begin_text, end_text, extend_text


class Bytes(Tokenizer):
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


# ---- tokenizers whose text of a token depends on its neighbours ----------------------------------

SPACE = "\u2581"
WORDS = ["a", "b", SPACE, f"{SPACE}a", "😀", "\ufffd", "."]


@pytest.fixture(scope="module", params=["byte fallback", "byte level", "sentencepiece"])
def real(request, tmp_path_factory):
    """A tokenizer, and the ids of which any sequence is tried: bytes, words, specials, none's."""
    folder = tmp_path_factory.mktemp("real")
    if request.param == "sentencepiece":
        train_sentencepiece(["aa ab \ufffd 😀 " * 30], 268, folder / "tokenizer.model")
        return load_tokenizer(folder / "tokenizer.model"), range(268)
    tokenizers = pytest.importorskip("tokenizers")
    decoders = tokenizers.decoders
    if request.param == "byte fallback":  # as Llama 2, Mistral and Gemma have it
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True
            )
        )
        steps = decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()
        made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE({piece: n for n, piece in enumerate(alphabet)}, [])
        )
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json"), range(made.get_vocab_size())


def stream_of(tokenizer, prompt, tokens):
    state, parts = begin_text(tokenizer, prompt), []
    for token in tokens:
        state, part, _ = extend_text(tokenizer, state, token, ())
        parts.append(part)
    return [*parts, end_text(tokenizer, state)]


def what_follows(tokenizer, prompt, tokens):
    """The text of all after what it shares with that of the prompt."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    same = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before)
    )
    return whole[same:]


@settings(max_examples=400, deadline=None)
@given(st.data())
def pieces_join_to_the_text_of_all_tokens_for_any_ids_and_split_test(real, data):
    tokenizer, known = real
    smile = tokenizer.encode("😀😀😀 ab é\ufffd")
    some = st.sampled_from(known) | st.sampled_from(smile)
    ids = data.draw(st.lists(some | st.just(smile), max_size=120))
    ids = [token for part in ids for token in (part if isinstance(part, list) else [part])]
    split = data.draw(st.integers(0, len(ids)))
    prompt, tokens = [tokenizer.bos_id, *ids[:split]], ids[split:]
    parts = stream_of(tokenizer, prompt, tokens)
    assert "".join(parts) == what_follows(tokenizer, prompt, tokens)


def a_run_of_bytes_is_held_until_it_is_complete_and_then_shown_as_characters_test(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: n for n, p in enumerate(pieces)}, []))
    made.decoder = tokenizers.decoders.ByteFallback()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    smiles = [2 + byte for byte in "😀".encode() * 400]
    parts = stream_of(tokenizer, [0], [*smiles, 258])
    assert parts == [*[""] * len(smiles), "😀" * 400 + "a", ""]
    assert stream_of(tokenizer, [0, *smiles[:2]], smiles[2:12]) == [*[""] * 10, "😀" * 3]
    assert stream_of(tokenizer, [0, *smiles[:4]], smiles[:4])[-1] == "😀"
