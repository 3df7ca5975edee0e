"""Every kind of tokenizer that an export carries gives transformers the ids that it gives here."""

import base64
import io
import json
import shutil
import warnings

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.data.tokenizer import encode_prompt, load_tokenizer, train_sentencepiece
from dmc_jax.data.tokenizer_formats import LLAMA3_SPECIAL_TOKENS
from dmc_jax.interop.tokenizer_export import write_tokenizer_files

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
with warnings.catch_warnings():  # of its own deprecated imports, which differ by version
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers import AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = "def f(x):\n    return x + 1  # émile's\t\tcafé, 1 < 2 > 0, 12345 times   and more. " * 40
# All but the mark that SentencePiece writes for a space, which is one there.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")
TEXTS = st.text(LETTERS, max_size=40) | st.text(" \n\taeé1f(x)<s>😀", max_size=40)


def sentencepiece_model(folder, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE[at : at + 1000] for at in range(0, len(SAMPLE), 1000)]),
        model_writer=model,
        minloglevel=2,
        byte_fallback=True,
        **({"vocab_size": 310, "model_type": "bpe"} | options),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def own(folder):
    train_sentencepiece([SAMPLE], 330, folder / "tokenizer.model")


def like_llama_2(folder):
    sentencepiece_model(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)


def normalising(folder):
    sentencepiece_model(folder, normalization_rule_name="nmt_nfkc")


def unigram(folder):
    sentencepiece_model(
        folder,
        model_type="unigram",
        vocab_size=294,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )


def without_bos(folder):
    own(folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')


def like_llama_3(folder):
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"  ", b"re", b" x", b"\xc3\xa9", b"    ", b"ret", b"urn", b"12", b"123"]
    lines = [f"{base64.b64encode(p).decode()} {rank}" for rank, p in enumerate(pieces)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


def byte_level_json(folder):
    """SmolLM2's kind: its own names, and no BOS."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([SAMPLE], trainer)
    made.save(str(folder / "tokenizer.json"))


KINDS = (own, like_llama_2, normalising, unigram, without_bos, like_llama_3, byte_level_json)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request, tmp_path_factory):
    """A tokenizer as it is loaded here, and as transformers loads its export."""
    before, after = (tmp_path_factory.mktemp(name) for name in ("before", "after"))
    request.param(before)
    shutil.copytree(before, after, dirs_exist_ok=True)
    (after / "config.json").write_text('{"model_type": "llama"}')
    name = next(file.name for file in before.glob("tokenizer.*") if file.name != "tokenizer_config")
    special = write_tokenizer_files(after, name, None, 64)
    ours = load_tokenizer(before / name)
    assert special == ours.special
    return ours, AutoTokenizer.from_pretrained(after)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def ids_of_any_text_are_the_same_test(pair, text):
    ours, theirs = pair
    as_text = {"split_special_tokens": True}  # special tokens that a text spells
    assert theirs(text, add_special_tokens=False, **as_text)["input_ids"] == ours.encode(text)
    if text:
        assert theirs(text, **as_text)["input_ids"] == encode_prompt(ours, text)


def long_texts_and_ends_are_the_same_test(pair):
    ours, theirs = pair
    assert theirs(SAMPLE)["input_ids"] == encode_prompt(ours, SAMPLE)
    assert theirs.eos_token_id == ours.eos_id
    assert (-1 if theirs.bos_token_id is None else theirs.bos_token_id) == ours.bos_id
    assert theirs.decode(ours.encode(SAMPLE), skip_special_tokens=True) == ours.decode(
        ours.encode(SAMPLE)
    )
    assert len(theirs) == ours.vocab_size


def the_file_of_tiktoken_gets_the_names_of_llama_3_test(tmp_path):
    like_llama_3(tmp_path)
    write_tokenizer_files(tmp_path, "tokenizer.model", None, 64)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert [entry["content"] for entry in written["added_tokens"]] == [*LLAMA3_SPECIAL_TOKENS]
    assert len(set(LLAMA3_SPECIAL_TOKENS)) == 256
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [265 + 1, 265 + 8, 265 + 9]
