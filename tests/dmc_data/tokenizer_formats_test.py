"""`tokenizer.json` and tiktoken files behind the same protocol as SentencePiece."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.data import tokenizer_formats
from dmc_jax.data.tokenizer import (
    encode_document,
    encode_prompt,
    format_of_file,
    load_tokenizer,
    token_bytes,
    train_sentencepiece,
)
from dmc_jax.errors import UserError

SAMPLE = "def f(x):\n    return x + 1  # émile's\t\tcafé, 12345 times\n" * 20
TEXTS = st.text(max_size=40) | st.text(alphabet=" \n\taé😀<|begin_of_text|>12", max_size=30)
LLAMA3_ENDS = ["<|begin_of_text|>", "<|end_of_text|>"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A byte-level tokenizer.json with Llama 3's special tokens, and a tiktoken file."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=LLAMA3_ENDS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([SAMPLE], trainer)
    # As Llama 3's does: BOS before every text, unless the caller says no.
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{LLAMA3_ENDS[0]} $A", special_tokens=[(LLAMA3_ENDS[0], 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    pieces = [bytes([byte]) for byte in range(256)] + [b"  ", b"re", b" x", b"\xc3\xa9", b"    "]
    lines = [f"{base64.b64encode(p).decode()} {rank}" for rank, p in enumerate(pieces)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(files, request):
    return load_tokenizer(files / request.param)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def text_its_bytes_and_its_stream_survive_test(tokenizer, text, stream_decode):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert "".join(stream_decode(tokenizer, encode_document(tokenizer, text))) == text


@pytest.mark.parametrize("character", [" ", "\n", "a", "1", "=", "é"])
def runs_of_any_length_are_encoded_test(tokenizer, character):
    text = f"x {character * 300_000} y"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet=" \n\u2003ab", max_size=40), longest=st.integers(1, 9))
def only_long_runs_are_cut_and_where_llama_3_cuts_them_test(text, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_formats, "_LONGEST_RUN", longest)
        parts = list(tokenizer_formats.short_runs(text))
    expected, run = [""], 0
    for before, character in zip(f"{text[:1]}{text}", text, strict=False):
        run = run + 1 if before.isspace() == character.isspace() else 1
        if run > longest:
            expected.append("")
            run = 1
        expected[-1] += character
    assert parts == expected


def bos_is_added_once_and_a_text_that_spells_it_is_text_test(tokenizer):
    ids = tokenizer.encode(f"{LLAMA3_ENDS[0]}a")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert encode_prompt(tokenizer, "a")[0] == tokenizer.bos_id
    assert encode_prompt(tokenizer, "a").count(tokenizer.bos_id) == 1
    assert tokenizer.decode(encode_document(tokenizer, "a")) == "a"
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].tolist() == [0, 0, 0]


def names_of_special_tokens_mean_them_where_that_is_asked_test(tokenizer):
    text = f"a{LLAMA3_ENDS[1]} b{LLAMA3_ENDS[0]}{LLAMA3_ENDS[0]}"
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    expected = [*tokenizer.encode("a"), end, *tokenizer.encode(" b"), begin, begin]
    assert tokenizer.encode_special(text) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert encode_prompt(tokenizer, text, special=True) == [begin, *expected]
    assert encode_prompt(tokenizer, LLAMA3_ENDS[0] + text, special=True) == [begin, *expected]


def llama_3_special_tokens_follow_the_byte_pairs_test(files):
    tokenizer = load_tokenizer(files / "tokenizer.model")
    assert tokenizer.vocab_size == 261 + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (261, 262)
    assert tokenizer.encode("12345") == [*b"12345"]
    assert tokenizer.encode("    ") == [260]
    named = "<|start_header_id|><|end_header_id|><|eom_id|><|eot_id|>"
    assert tokenizer.encode_special(named) == [261 + 6, 261 + 7, 261 + 8, 261 + 9]


def a_tokenizer_json_made_from_sentencepiece_counts_bytes_alike_test(tmp_path):
    pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<0x41>": 2, "\u2581": 3, "\u2581é": 4, "<unk>": 5}
    added = [
        {"id": i, "content": c, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for i, c in enumerate(["<s>", "</s>"])
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)
    assert token_bytes(loaded)[:5].tolist() == [0, 0, 1, 1, 3]


def formats_are_told_by_their_contents_test(files, tmp_path):
    train_sentencepiece([SAMPLE], 330, tmp_path / "any name")
    found = [format_of_file(f) for f in (*sorted(files.iterdir()), tmp_path / "any name")]
    assert found == ["json", "tiktoken", "sentencepiece"]


def broken_files_are_refused_test(files, tmp_path):
    good = (files / "tokenizer.model").read_text().splitlines()
    unnamed = (files / "tokenizer.json").read_text().replace("_of_text", "")
    for content, message in (
        ('{"model": {"type": "Unheard"}}', "cannot be read by the tokenizers library"),
        (unnamed, "no EOS token of a known name"),
        ("\n".join(good[1:]), "ranks or pieces are missing or doubled"),
        ("\n".join([*good, f"{good[0].split()[0]} 261"]), "ranks or pieces are missing or doubled"),
        ("\n".join([*good, "x"]), "line 262: expected `BASE64 RANK`"),
        ("[" * 100_000, "not a SentencePiece model"),
    ):
        (tmp_path / "t").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def a_missing_library_is_named_test(library, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)  # as if not installed
    content = {"tokenizers": '{"model": {}}', "tiktoken": "QQ== 0\n"}[library]
    (tmp_path / "t").write_text(content)
    with pytest.raises(UserError, match=f"pip install {library}"):
        load_tokenizer(tmp_path / "t")
