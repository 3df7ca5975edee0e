"""What lies beside a tokenizer: ends, BOS, added tokens; and files that are no tokenizer."""

import json

import numpy as np
import pytest

from dmc_jax.data.tokenizer import (
    encode_document,
    encode_prompt,
    load_tokenizer,
    train_sentencepiece,
)
from dmc_jax.data.tokenizer_files import SpecialTokens, copy_with_companions
from dmc_jax.errors import UserError

SAMPLE = "def f(x):\n    return x + 1  # émile's\t\tcafé\n" * 50


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_sentencepiece([SAMPLE], 300, path)
    return path.read_bytes()


@pytest.fixture
def load(model, tmp_path):
    """Load a SentencePiece tokenizer of 300 pieces (BOS 1, EOS 2) with files beside it."""

    def load(**files):
        (tmp_path / "tokenizer.model").write_bytes(model)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path / "tokenizer.model")

    return load


CHATML = {
    "tokenizer_config": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"},
    "added_tokens": {"<|im_start|>": 301, "<|im_end|>": 300},
    "special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]},
}
DECODER = {
    "added_tokens_decoder": {
        "2": {"content": "</s>", "special": True},
        "300": {"content": "<|im_end|>", "special": True},
        "302": {"content": "<think>", "special": False},
    },
    "eos_token": "<|im_end|>",
}


@pytest.mark.parametrize(
    "files, special",
    [
        ({}, SpecialTokens(1, (2,), 3, True)),
        (
            {"generation_config": {"eos_token_id": [257, 258]}},
            SpecialTokens(1, (2, 257, 258), 3, True),
        ),
        ({"config": {"eos_token_id": 2, "bos_token_id": 1}}, SpecialTokens(1, (2,), 3, True)),
        (
            {"config": {"eos_token_id": 260}, "generation_config": {"eos_token_id": [259, -1]}},
            SpecialTokens(1, (2, 259, 260), 3, True),
        ),
        ({"tokenizer_config": {"add_bos_token": False}}, SpecialTokens(1, (2,), 3, False)),
        (CHATML, SpecialTokens(1, (300,), 3, True)),
        ({"tokenizer_config": DECODER}, SpecialTokens(1, (300,), 3, True)),
        ({"special_tokens_map": {"pad_token": "<s>"}}, SpecialTokens(1, (2,), 1, True)),
        (
            {"tokenizer_config": {"bos_token": None, "pad_token": "gone"}},
            SpecialTokens(1, (2,), 3, True),
        ),
    ],
)
def a_model_marks_its_texts_as_its_files_say_test(load, files, special):
    assert load(**files).special == special


def prompts_and_documents_follow_the_rule_of_the_model_test(load, tmp_path):
    ids = load().encode("return")
    assert encode_prompt(load(), "return") == [1, *ids]
    bare = load(tokenizer_config={"add_bos_token": False}, generation_config={"eos_token_id": 280})
    assert encode_prompt(bare, "return") == ids
    assert encode_document(bare, "return") == [*ids, 2]
    # Something has to be there to continue.
    assert encode_prompt(bare, "") == [1]
    assert encode_document(bare, "") == [2]
    forced = load_tokenizer(tmp_path / "tokenizer.model", add_bos=True)
    assert encode_prompt(forced, "return") == [1, *ids]
    assert forced.eos_ids == (2, 280)


@pytest.mark.parametrize("files", [CHATML, {"tokenizer_config": DECODER}], ids=["old", "new"])
def ids_without_a_piece_stand_for_nothing_and_added_ones_for_themselves_test(load, files):
    tokenizer = load(**files)
    ids = tokenizer.encode("return x")
    assert tokenizer.decode([1, *ids[:1], 300, 99_999, *ids[1:], 2, -1]) == "return x"
    assert tokenizer.decode([99_999]) == ""
    thinks = "tokenizer_config" in files and "added_tokens_decoder" in files["tokenizer_config"]
    assert tokenizer.decode([302, *ids]) == ("<think>" if thinks else "") + "return x"
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) == ((303,) if thinks else (302,))
    assert sizes[300:].tolist() == ([0, 0, len("<think>")] if thinks else [0, 0])


def a_text_after_an_added_token_keeps_its_space_test(tmp_path):
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE[:2000]]),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "t").write_bytes(written.getvalue())
    (tmp_path / "added_tokens.json").write_text('{"<x>": 300}')
    tokenizer = load_tokenizer(tmp_path / "t")
    ids = tokenizer.encode("return x")
    assert tokenizer.dummy_prefix
    assert tokenizer.decode(ids) == "return x"
    assert tokenizer.decode([*ids, 300, *ids]) == "return x<x> return x"


def a_copy_marks_texts_as_the_original_does_test(load, tmp_path):
    original = load(
        **CHATML,
        config={"eos_token_id": [7, 300]},
        generation_config={"temperature": 0.5},
    )
    (tmp_path / "copy").mkdir()
    copy_with_companions(tmp_path / "tokenizer.model", tmp_path / "copy" / "other name")
    assert load_tokenizer(tmp_path / "copy" / "other name").special == original.special
    assert original.eos_ids == (300, 7)
    kept = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.5
    assert not (tmp_path / "copy" / "config.json").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config", '{"add_bos_token": "yes"}', "add_bos_token is 'yes'; expected true"),
        ("generation_config", '{"eos_token_id": "2"}', "eos_token_id is '2'; expected a token id"),
        ("config", '{"eos_token_id": [true]}', "config.json: eos_token_id is"),
        ("generation_config", '{"eos_token_id": ', "generation_config.json is not JSON"),
        ("added_tokens", "[]", "added_tokens.json: expected a JSON object, found list"),
        ("added_tokens", '{"<x>": null}', "'<x>' has None; expected an id"),
        (
            "tokenizer_config",
            '{"eos_token": "<end>"}',
            "eos_token is '<end>', which tokenizer.model",
        ),
        (
            "tokenizer_config",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 51034\n",
            "tokenizer_config.json is a Git LFS pointer .* which has 51,034 bytes",
        ),
    ],
)
def damaged_files_are_named_test(load, tmp_path, name, content, message):
    load()
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "tokenizer.model")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n"


def what_is_no_tokenizer_is_refused_at_once_by_name_test(model, tmp_path):
    file = tmp_path / "tokenizer.model"
    cases = {
        POINTER: "is a Git LFS pointer .* which has 499,723 bytes",
        b"<!DOCTYPE html>": "DOCTYPE",
    }
    cases |= {b"": "its 0 bytes", b'{"version": "1.0", "model": {': "cut short"}
    # Cut anywhere, also exactly after a piece, where the rest is a sound but smaller model.
    ends = np.cumsum([0, *piece_lengths(model)])
    for at in (*ends[[1, 100, -1]], *ends[[1, 100]] + 2, len(model) - 1):
        cases[model[:at]] = "cut short"
    for content, message in cases.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"tokenizer.model .*{message}"):
            load_tokenizer(file)


def piece_lengths(model):
    """Bytes of each piece in a serialized model, where all are shorter than 128."""
    at, lengths = 0, []
    while model[at] == 0x0A:
        lengths.append(2 + model[at + 1])
        at += lengths[-1]
    return lengths
