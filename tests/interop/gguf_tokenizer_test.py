"""Tokenizers in GGUF metadata give the ids that their own libraries and transformers give."""

import io
import json
import warnings

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.checkpoints.models import find_model, load_tokenizer_of
from dmc_jax.data.chat import encode_chat
from dmc_jax.data.tokenizer import encode_prompt, load_tokenizer
from dmc_jax.data.tokenizer_formats import LLAMA3_PATTERN
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.formats import open_source, with_tokenizer
from tests.interop.gguf_by_hand import gguf_bytes, llama_metadata, llama_tensors
from tests.interop.reference_llama import Sizes, random_weights

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, pre_tokenizers  # noqa: E402

SAMPLE = (
    "def f(x):\n    return x + 1  # émile's\t\tcafé, I'll 1 < 2 > 0, 12345 times   and more. " * 40
)
TEXTS = (
    "The capital of France is",
    " leading",
    "   three leading, trailing ",
    "\n\nnew\n  lines\t\ttabs\r\n",
    "in 2024: 1,234.5 or 12345",
    "🙂 👩‍👩‍👧 emoji",
    "日本語のテキスト 中文 한국어",
    "I'll don't WE'VE it's",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<tool>b <tool> c",
    "",
)
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0`")
ANY = st.text(LETTERS, max_size=40) | st.text(" \n\taeé1f(x)<s>'l½😀", max_size=40)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the tokenizer.json of GPT-2, SmolLM2 and Llama 3 have. llama.cpp's `default` is Falcon's but
# for `, which no text here has.
PUBLISHED = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "default": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
}


def write(file, keys, rows=None, **changes):
    count = len(keys.get("tokenizer.ggml.tokens", ())) or 19
    sizes = Sizes(V=rows or count)
    metadata = llama_metadata(sizes) | keys | changes
    metadata = {key: x for key, x in metadata.items() if x is not None}
    file.write_bytes(gguf_bytes(metadata, llama_tensors(random_weights(sizes), sizes)))
    return file


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# ---- byte-level ---------------------------------------------------------------------------------


def trained(pre):
    """A byte-level tokenizer of the library's own, with merges across digits where `pre` has it."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    found.pre_tokenizer = PUBLISHED[pre]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([SAMPLE], trainer)
    found.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return found


def byte_level_keys(theirs, pre):
    model = json.loads(theirs.to_str())["model"]
    vocabulary = theirs.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = np.ones(len(tokens), "<i4")
    types[:3], types[vocabulary["<tool>"]] = 3, 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.mark.parametrize("pre", PUBLISHED)
def byte_level_tokenizers_give_the_ids_of_the_published_ones_test(pre, tmp_path):
    theirs = trained(pre)
    file = write(tmp_path / "x.gguf", byte_level_keys(theirs, pre))
    ours = load_tokenizer(open_source(file).tokenizer[0])

    @settings(max_examples=150, deadline=None)
    @given(ANY)
    def same(text):
        assert ours.encode_special(text) == theirs.encode(text).ids
        theirs.encode_special_tokens = True
        assert ours.encode(text) == theirs.encode(text).ids
        theirs.encode_special_tokens = False
        assert ours.decode(ours.encode(text)) == text

    for text in TEXTS:
        assert ours.encode_special(text) == theirs.encode(text).ids
    same()


def digits_of_smollm_stand_alone_test(tmp_path):
    theirs = trained("gpt-2")  # whose merges join digits
    assert len(theirs.encode(" 12345").ids) == 1
    file = write(tmp_path / "x.gguf", byte_level_keys(theirs, "smollm"))
    ours = load_tokenizer(open_source(file).tokenizer[0])
    assert list(map(ours.name_of, ours.encode(" 12345"))) == ["Ġ", "1", "2", "3", "4", "5"]


# ---- SentencePiece ------------------------------------------------------------------------------


def sentencepiece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE[at : at + 1000] for at in range(0, len(SAMPLE), 1000)]),
        model_writer=model,
        minloglevel=2,
        vocab_size=370,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["<tool>"],
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_keys(theirs, **changes):
    def type_of(token):
        kinds = (theirs.is_unknown, theirs.is_control, theirs.is_unused, theirs.is_byte)
        numbers = [n for is_it, n in zip(kinds, (2, 3, 5, 6), strict=True) if is_it(token)]
        user_defined = theirs.id_to_piece(token) == "<tool>"
        return numbers[0] if numbers else 4 if user_defined else 1

    ids = range(theirs.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(token) for token in ids],
        "tokenizer.ggml.scores": np.array([theirs.get_score(token) for token in ids], "<f4"),
        "tokenizer.ggml.token_type": np.array([type_of(token) for token in ids], "<i4"),
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.chat_template": TEMPLATE,
    } | changes


@pytest.mark.parametrize("prefix", [True, False])
def sentencepiece_tokenizers_give_the_ids_of_the_model_they_were_test(prefix, tmp_path):
    theirs = sentencepiece_model(add_dummy_prefix=prefix)
    keys = sentencepiece_keys(theirs, **{"tokenizer.ggml.add_space_prefix": prefix})
    ours = load_tokenizer(open_source(write(tmp_path / "x.gguf", keys)).tokenizer[0])
    assert ours.dummy_prefix == prefix and ours.add_bos
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), (theirs.eos_id(),))

    @settings(max_examples=150, deadline=None)
    @given(ANY.filter(lambda text: "\u2581" not in text))
    def same(text):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))

    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    same()


# ---- marks --------------------------------------------------------------------------------------


def marks_come_from_the_metadata_test(tmp_path):
    keys = byte_level_keys(trained("smollm"), "smollm")
    file = write(tmp_path / "x.gguf", keys, **{"tokenizer.ggml.eot_token_id": 0})
    model = find_model(file)
    tokenizer = load_tokenizer_of(model)
    assert tokenizer.special.bos_id == 1 and not tokenizer.add_bos
    assert tokenizer.eos_ids == (2, 0) and tokenizer.pad_id == 0
    ids = encode_chat(tokenizer, model.tokenizer, [{"role": "user", "content": "<|im_end|>hi"}])
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 2
    assert tokenizer.decode(ids) == "user\nhi\nassistant\n"


def bos_is_added_where_llama_cpp_adds_it_test(tmp_path):
    def begins(keys, **changes):
        file = write(tmp_path / "x.gguf", keys, **changes)
        tokenizer = load_tokenizer(open_source(file).tokenizer[0])
        return encode_prompt(tokenizer, "a")[0] == tokenizer.bos_id

    unsaid = {"tokenizer.ggml.add_bos_token": None}
    for pre, expected in {"smollm": False, "gpt-2": False, "llama-bpe": True}.items():
        keys = byte_level_keys(trained(pre), pre)
        assert begins(keys, **unsaid) == expected
        assert begins(keys, **{"tokenizer.ggml.add_bos_token": not expected}) != expected
    keys = sentencepiece_keys(sentencepiece_model())
    assert begins(keys) and not begins(keys, **{"tokenizer.ggml.add_bos_token": False})


def unused_tokens_that_fill_up_the_vocabulary_stand_for_nothing_test(tmp_path):
    keys = byte_level_keys(trained("llama-bpe"), "llama-bpe")
    count = len(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + ["[PAD]", "[PAD]"]
    keys["tokenizer.ggml.token_type"] = np.append(keys["tokenizer.ggml.token_type"], [5, 5]).astype(
        "<i4"
    )
    source = with_tokenizer(open_source(write(tmp_path / "x.gguf", keys)))
    tokenizer = load_tokenizer(source.tokenizer[0])
    assert source.config.vocab_size == count + 2 and tokenizer.vocab_size == count
    assert max(tokenizer.encode("[PAD]")) < count
    assert any("the others stand for nothing" in note for note in source.notes)


def a_converted_model_keeps_tokenizer_and_template_test(tmp_path):
    file = write(tmp_path / "x.gguf", byte_level_keys(trained("smollm"), "smollm"))
    source = with_tokenizer(open_source(file))
    (tmp_path / "ours").mkdir()
    write_dmc_jax(source, tmp_path / "ours", None, lambda _: None)
    before, after = find_model(file), find_model(tmp_path / "ours")
    assert after.tokenizer.is_relative_to(tmp_path / "ours")
    one, other = load_tokenizer_of(before), load_tokenizer_of(after)
    messages = [{"role": "user", "content": "hello 123"}]
    assert encode_chat(one, before.tokenizer, messages) == encode_chat(
        other, after.tokenizer, messages
    )
    assert before.accepts_tokenizer(next(iter(after.tokenizer_sha256)))
    assert one.special == other.special


# ---- what cannot be read ------------------------------------------------------------------------


REFUSED = {
    "unknown tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "is 'rwkv'; gpt2 and llama"),
    "unknown cut": (
        {"tokenizer.ggml.pre": "tekken"},
        "is 'tekken'; those that can be read are gpt-2",
    ),
    "no cut": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens is no list of texts"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges is no list of texts"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["a"]}, "'a'; expected two tokens that make"),
    "a merge too large": ({"tokenizer.ggml.merges": ["x (", "a"]}, "'x \\('; expected two tokens"),
    "an id too large": ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id is 9999, there are"),
    "an id of text": ({"tokenizer.ggml.bos_token_id": "one"}, "bos_token_id is 'one'"),
    "fewer types": ({"tokenizer.ggml.token_type": np.ones(3, "<i4")}, "token_type is no array of"),
    "a template of numbers": ({"tokenizer.chat_template": 3}, "chat_template no text"),
    "a flag of text": ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is no truth value"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def what_cannot_be_read_is_named_and_the_weights_stay_of_use_test(change, message, tmp_path):
    theirs = trained("smollm")
    keys = byte_level_keys(theirs, "smollm")
    file = write(tmp_path / "x.gguf", keys, len(keys["tokenizer.ggml.tokens"]), **change)
    model = find_model(file)
    (note,) = [note for note in model.notes if "its tokenizer cannot be read" in note]
    assert str(file) in note and "\n" not in note
    with pytest.raises(UserError, match=message):
        raise UserError(note)
    with pytest.raises(UserError, match="name one with --tokenizer=FILE"):
        load_tokenizer_of(model)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer_of(model, tmp_path / "tokenizer.json").encode("a")


def a_token_twice_or_no_sentencepiece_model_is_refused_test(tmp_path):
    def note(keys, **changes):
        source = open_source(write(tmp_path / "x.gguf", keys, **changes))
        return " ".join(source.notes)

    keys = byte_level_keys(trained("smollm"), "smollm")
    doubled = [*keys["tokenizer.ggml.tokens"][:-1], "a"]
    assert "the token 'a' is empty or there twice" in note(
        keys, **{"tokenizer.ggml.tokens": doubled}
    )
    keys = sentencepiece_keys(sentencepiece_model())
    assert "scores is no array" in note(keys, **{"tokenizer.ggml.scores": None})
    nan = np.full_like(keys["tokenizer.ggml.scores"], np.nan)
    assert "scores is no array" in note(keys, **{"tokenizer.ggml.scores": nan})
    none = np.ones_like(keys["tokenizer.ggml.token_type"])
    assert "make no SentencePiece model" in note(keys, **{"tokenizer.ggml.token_type": none})


def a_cache_that_cannot_be_written_is_said_with_the_variable_to_set_test(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = write(tmp_path / "x.gguf", byte_level_keys(trained("smollm"), "smollm"))
    assert any("set XDG_CACHE_HOME" in note for note in open_source(file).notes)


def a_damaged_cache_is_written_anew_test(tmp_path):
    file = write(tmp_path / "x.gguf", byte_level_keys(trained("smollm"), "smollm"))
    kept = open_source(file).tokenizer[0]
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    assert open_source(file).tokenizer[0] == kept and kept.read_bytes() == whole


# ---- transformers -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "llama"])
def transformers_reads_the_same_ids_from_the_file_test(kind, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    with warnings.catch_warnings():  # of its own deprecated imports, which differ by version
        warnings.simplefilter("ignore")
        AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    if kind == "llama":
        keys = sentencepiece_keys(sentencepiece_model())
    else:
        keys = byte_level_keys(trained(kind), kind)
    file = write(tmp_path / "x.gguf", keys)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ours = load_tokenizer(open_source(file).tokenizer[0])
    for text in TEXTS:
        # SentencePiece puts its space before a text that begins with one and after a special token
        # too, as llama.cpp does; transformers puts it before other texts alone.
        if kind == "llama" and text.startswith((" ", "<|")):
            continue
        assert ours.encode_special(text) == theirs.encode(text, add_special_tokens=False), text
    messages = [{"role": "user", "content": "hello there"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = encode_chat(ours, open_source(file).tokenizer[0], messages)
    assert ids == ours.encode_special(rendered)
    assert ours.bos_id == theirs.bos_token_id and ours.eos_id == theirs.eos_token_id
