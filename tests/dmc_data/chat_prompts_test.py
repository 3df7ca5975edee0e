"""Special tokens that are meant, and chats, become the ids that transformers gives."""

import json

import pytest

from dmc_jax.data.chat import encode_chat
from dmc_jax.data.tokenizer import encode_prompt, load_tokenizer, train_sentencepiece
from dmc_jax.errors import UserError

# That of ChatML, with what such templates are fond of: trimmed blocks, `tojson`, loop controls.
TEMPLATE = """{%- for message in messages %}
    {%- if message['role'] == 'skip' %}{% continue %}{% endif %}
    {%- if message['role'] == 'bad' %}{{ raise_exception('no such role: ' ~ bos_token) }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
CHAT = [
    {"role": "skip", "content": "never"},
    {"role": "system", "content": "é <s> 1"},
    {"role": "user", "content": "ab"},
]
RENDERED = (
    "<|im_start|>system\né <s> 1<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer.json with ChatML's tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: n for n, piece in enumerate(alphabet)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
    config["chat_template"] = TEMPLATE
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def special_tokens_are_such_where_they_are_meant_and_else_text_test(folder):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = "a<|im_end|>b</s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    meant = [*tokenizer.encode("a"), 259, *tokenizer.encode("b"), 257]
    assert tokenizer.encode_special(text) == meant
    assert tokenizer.decode(tokenizer.encode(text)) == text  # as before
    for begun in (text, f"<s>{text}"):
        assert encode_prompt(tokenizer, begun, special=True) == [256, *meant]


def sentencepiece_has_its_control_tokens_test(tmp_path):
    train_sentencepiece(["ab é " * 30], 266, tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    ids = encode_prompt(tokenizer, "ab</s><s> é<pad>", special=True)
    text = tokenizer.encode("ab"), tokenizer.encode(" é")
    assert ids == [1, *text[0], 2, 1, *text[1], 3]
    assert tokenizer.encode_special("") == []


def a_chat_is_what_its_template_makes_of_it_test(folder):
    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(file)
    ids = encode_chat(tokenizer, file, CHAT)
    assert ids == tokenizer.encode_special(RENDERED)
    assert [token for token in ids if token >= 256] == [258, 256, 259, 258, 259, 258]


def a_chat_gets_the_ids_that_transformers_gives_test(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert expected == RENDERED
    ids = theirs(expected, add_special_tokens=False).input_ids
    file = folder / "tokenizer.json"
    assert encode_chat(load_tokenizer(file), file, CHAT) == ids


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]}),
        ),
    ],
)
def a_template_is_found_wherever_it_is_kept_test(folder, name, content):
    file = folder / "tokenizer.json"
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="there is none beside its tokenizer"):
        encode_chat(load_tokenizer(file), file, CHAT)
    (folder / name).write_text(content)
    assert encode_chat(load_tokenizer(file), file, CHAT)


@pytest.mark.parametrize(
    "template, messages, complaint",
    [
        (TEMPLATE, [{"role": "bad", "content": ""}], "no such role: <s>"),
        (TEMPLATE, [{"role": "user"}], "the chat template refuses it"),
        ("{% if %}", CHAT, "not a chat template that Jinja reads"),
        ("{{ messages.__class__.__mro__ }}", CHAT, "unsafe"),
        ("{{ messages.append(1) }}", CHAT, "unsafe|not callable|safe"),
    ],
)
def a_template_reaches_nothing_and_its_refusal_is_told_test(folder, template, messages, complaint):
    (folder / "chat_template.jinja").write_text(template)
    file = folder / "tokenizer.json"
    with pytest.raises(UserError, match=complaint):
        encode_chat(load_tokenizer(file), file, messages)
