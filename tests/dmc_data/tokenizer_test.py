"""Text survives the tokenizer, bytes are counted, and streaming shows the same text."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.data.tokenizer import (
    Tokenizer,
    encode_document,
    encode_prompt,
    fingerprint,
    load_tokenizer,
    token_bytes,
    train_sentencepiece,
)
from dmc_jax.errors import UserError

SAMPLE = ["def f(x):\n    return x + 1  # émile's\t\tcafé\n" * 50, "the quick brown fox. " * 200]
# Spaces, SentencePiece's own space mark, replacement characters, and anything else.
TEXTS = st.text(max_size=60) | st.text(alphabet=" \n\t\u2581\ufffdaé😀<s>", max_size=40)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "tokenizer.model"
    train_sentencepiece(SAMPLE, 330, path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def like_llama(tmp_path_factory):
    """A model with a dummy prefix and no padding token, as Llama 2's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE[1:]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        max_sentence_length=100_000,
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def text_and_its_bytes_survive_encoding_test(own, text):
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert token_bytes(own)[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def text_survives_a_model_with_a_dummy_prefix_and_costs_one_byte_more_test(like_llama, text):
    ids = like_llama.encode(text)
    assert like_llama.dummy_prefix
    assert like_llama.decode(ids) == text
    assert token_bytes(like_llama)[ids].sum() == len(text.encode()) + bool(text)


def control_tokens_stand_for_no_bytes_and_byte_tokens_for_one_test(own):
    sizes = token_bytes(own)
    assert sizes.shape == (own.vocab_size,) == (330,)
    assert sizes[[0, own.bos_id, own.eos_id, own.pad_id]].tolist() == [0, 0, 0, 0]
    assert sizes[4:260].tolist() == [1] * 256
    assert (sizes[260:] >= 1).all()


def ends_are_added_by_the_two_framing_functions_only_test(own, like_llama):
    for tokenizer in (own, like_llama):
        bare = tokenizer.encode("the fox")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(bare)
        assert encode_prompt(tokenizer, "the fox") == [tokenizer.bos_id, *bare]
        assert encode_document(tokenizer, "the fox") == [tokenizer.bos_id, *bare, tokenizer.eos_id]
        assert tokenizer.decode(encode_document(tokenizer, "the fox")) == "the fox"
    assert own.pad_id == 3
    assert like_llama.pad_id == like_llama.eos_id


def names_of_control_tokens_mean_them_where_that_is_asked_test(own, like_llama):
    for tokenizer in (own, like_llama):
        ids = tokenizer.encode_special("<s>the fox</s><s>fox")
        begin, end = tokenizer.bos_id, tokenizer.eos_id
        assert ids == [begin, *tokenizer.encode("the fox"), end, begin, *tokenizer.encode("fox")]
        assert tokenizer.encode_special("the <fox>") == tokenizer.encode("the <fox>")


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def streamed_parts_of_any_text_join_to_it_without_broken_characters_test(own, text, stream_decode):
    parts = list(stream_decode(own, encode_document(own, text)))
    assert "".join(parts) == text
    assert all(parts)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 299), max_size=40), repeats=st.integers(1, 6))
def streamed_parts_of_any_tokens_join_to_the_whole_decoding_test(
    own, like_llama, ids, repeats, stream_decode
):
    for tokenizer in (own, like_llama):
        assert "".join(stream_decode(tokenizer, ids * repeats)) == tokenizer.decode(ids * repeats)


def streaming_keeps_the_space_after_a_run_of_control_tokens_test(like_llama, stream_decode):
    ids = [*like_llama.encode("fox " * 60)[:56], *[like_llama.bos_id] * 8]
    ids += like_llama.encode("fox")  # starts with a space token, which decoding drops at a start
    assert "".join(stream_decode(like_llama, ids)) == like_llama.decode(ids)


def streaming_shows_each_character_as_soon_as_it_is_complete_test(own, stream_decode):
    ids = own.encode("a😀b")
    shown, seen = [], []

    def feed():
        for token in ids:
            yield token
            seen.append("".join(shown))

    for part in stream_decode(own, feed()):
        shown.append(part)
    assert seen == ["a", "a", "a", "a", "a😀", "a😀b"]


def streaming_a_long_text_decodes_a_bounded_number_of_tokens_at_a_time_test(own, stream_decode):
    longest = 0

    class Counting(Tokenizer):
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return own.decode(ids)

    text = SAMPLE[0] * 3
    assert "".join(stream_decode(Counting(), own.encode(text))) == text
    assert longest <= 70


def training_twice_gives_the_same_file_and_learns_whitespace_test(tmp_path, own, capfd):
    for name in "ab":
        train_sentencepiece(SAMPLE, 330, tmp_path / name)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert len(own.encode(SAMPLE[0])) < 0.6 * len(SAMPLE[0])
    assert len(own.encode("    ")) == 1
    assert capfd.readouterr() == ("", "")


def bad_tokenizers_and_sizes_are_refused_test(tmp_path):
    with pytest.raises(UserError, match="5000 ids cannot be trained .* too high"):
        train_sentencepiece(["a b c"], 5000, tmp_path / "t")
    with pytest.raises(UserError, match="100 ids cannot be trained"):
        train_sentencepiece(["a b c"], 100, tmp_path / "t")
    with pytest.raises(UserError, match="1024 ids cannot be trained"):
        train_sentencepiece([], 1024, tmp_path / "t")
    with pytest.raises(UserError, match="t does not exist"):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.json")
