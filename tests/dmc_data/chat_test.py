"""Conversations become the text and the tokens that transformers makes of them."""

import itertools
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.prepare import prepare
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.errors import UserError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}"
    "{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim }}\n"
    "    {%- if message.call is defined %}{{ message.call | tojson }}{% endif %}\n"
    "    {%- generation %}{{- eos_token }}{% endgeneration %}\n"
    "{%- endfor %}\n"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
TALKS = [
    [{"role": "user", "content": f" {n} <b> & é? "}, {"role": "assistant", "content": f"é{n}!"}]
    for n in range(60)
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a byte-level tokenizer.json of ChatML's tokens and its companion."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a user and an assistant"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    configure(tmp_path, CHATML)
    return tmp_path


def configure(folder, template):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_talks(path, talks):
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("answer_next", [False, True])
def text_and_tokens_of_conversations_are_those_of_transformers_test(folder, template, answer_next):
    transformers = pytest.importorskip("transformers")
    configure(folder, template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder / "tokenizer.json")
    render = load_chat_template(folder / "tokenizer.json", answer_next=answer_next)
    call = {"role": "assistant", "content": "", "call": {"x": "<é>", "n": 5}}
    for talk in [*TALKS[:3], [{"role": "tool", "content": "x"}, call]]:
        options = {"add_generation_prompt": answer_next}
        text = theirs.apply_chat_template(talk, tokenize=False, **options)
        assert render(talk) == text
        ids = theirs.apply_chat_template(talk, **options)
        assert ours.encode_special(text) == list(getattr(ids, "input_ids", ids))


def templates_are_found_where_checkpoints_keep_them_test(folder):
    file = folder / "tokenizer.json"
    talk = [{"role": "user", "content": "x"}]
    assert load_chat_template(file)(talk) == "<|im_start|>user\nx<|im_end|>\n"
    configure(folder, [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}])
    assert load_chat_template(file)(talk) == "named"
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    assert load_chat_template(file)(talk) == "older"
    (folder / "chat_template.jinja").write_text("newer")
    assert load_chat_template(file)(talk) == "newer"
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load_chat_template(file) is None


@pytest.mark.parametrize("template", ["{% for %}", 5, "{{ ''.__class__.__mro__[1] }}"])
def a_template_that_cannot_be_rendered_is_refused_test(folder, template):
    configure(folder, template)
    with pytest.raises((UserError, ValueError), match="chat.template"):
        load_chat_template(folder / "tokenizer.json")([{"role": "user", "content": "x"}])


def a_missing_or_unsafe_jinja_is_named_test(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["jinja2"], "__version__", "3.1.5")
    with pytest.raises(UserError, match="pip install 'jinja2>=3.1.6'"):
        load_chat_template(folder / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="pip install 'jinja2>=3.1.6'"):
        load_chat_template(folder / "tokenizer.json")


def conversations_are_prepared_as_their_template_has_them_test(folder, tmp_path):
    source = write_talks(tmp_path / "talks.jsonl", TALKS)
    file = folder / "tokenizer.json"
    render, tokenizer = load_chat_template(file), load_tokenizer(file)
    expected = {tuple(tokenizer.encode_special(render(talk))) for talk in TALKS}

    def prepared(name, source):
        data = prepare(tmp_path / name, source=source, tokenizer=file, report=lambda _: None)
        return {
            split: {
                tuple(data.tokens[split][begin:end].tolist())
                for begin, end in itertools.pairwise(ends)
            }
            for split, ends in data.documents.items()
        }

    by_split = prepared("jsonl", source)
    assert set().union(*by_split.values()) == expected
    # As in parquet, where every message has every field; and by another template.
    whole = [[{"name": None} | message for message in talk] for talk in TALKS]
    schema = pyarrow.schema(
        [("messages", pyarrow.list_(pyarrow.struct({k: pyarrow.string() for k in whole[0][0]})))]
    )
    table = pyarrow.Table.from_pylist([{"messages": talk} for talk in whole], schema=schema)
    parquet.write_table(table, tmp_path / "talks.parquet")
    assert prepared("parquet", tmp_path / "talks.parquet") == by_split
    configure(folder, LLAMA3)
    other = prepared("other", source)
    assert {s: len(found) for s, found in other.items()} == {
        s: len(found) for s, found in by_split.items()
    }


def conversations_that_cannot_be_rendered_are_bad_rows_test(folder, tmp_path):
    file = folder / "tokenizer.json"

    def refusal(talks, **options):
        source = write_talks(tmp_path / "talks.jsonl", talks)
        with pytest.raises(UserError) as refused:
            prepare(tmp_path / "out", source=source, report=lambda _: None, **options)
        return str(refused.value)

    assert "talks.jsonl:1: a conversation, whose text depends" in refusal(TALKS)
    for talk in ([], ["x"], [{"content": "x"}], [{"role": 5}]):
        message = refusal([*TALKS[:2], talk], tokenizer=file)
        assert "talks.jsonl:3: expected a list of objects with role and content" in message
    configure(folder, STRICT)
    message = refusal(TALKS, tokenizer=file)
    assert "talks.jsonl:1: the chat template refuses it: roles must alternate" in message


def names_of_special_tokens_in_a_text_mean_them_where_that_is_asked_test(folder, tmp_path):
    file = folder / "tokenizer.json"
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    tokenizer = load_tokenizer(file)
    for number in range(80):
        (tmp_path / f"{number}.txt").write_text(f"<s>{number}<|im_end|>")
    for special in (False, True):
        data = prepare(
            tmp_path / f"special {special}",
            source=tmp_path,
            tokenizer=file,
            special_tokens=special,
            report=lambda _: None,
        )
        ids = data.tokens["train"].tolist()
        assert ids.count(tokenizer.bos_id) == data.manifest["splits"]["train"]["documents"]
        assert (3 in ids) == special
