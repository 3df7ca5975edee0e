"""Chats as prompts: the model's own template makes a text of messages, special tokens and all.

The templates are those of Hugging Face (`apply_chat_template`): Jinja, beside the tokenizer, in
`chat_template.jinja`, or in `tokenizer_config.json` or `chat_template.json` under `chat_template`.
They come with a model, so from strangers, and run in Jinja's sandbox.
"""

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmc_jax.data.tokenizer import Tokenizer, encode_prompt
from dmc_jax.errors import UserError

_CONFIG = "tokenizer_config.json"


def encode_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text whose special tokens, such as <|im_start|>, are meant as such. Adds no BOS.

    Args:
        tokenizer: of the text.
        text: to encode.
    """
    own = getattr(tokenizer, "encode_with_special", None)
    if own is not None:  # a library that knows better what a special token does to its neighbours
        return own(text)
    names = tokenizer.special_tokens
    longest_first = sorted(names, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if names else [text]
    ids = []
    for part in parts:
        ids += [names[part]] if part in names else tokenizer.encode(part)
    return ids


def encode_prompt_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Do what `encode_prompt` does, special tokens meant as such: a BOS that is there is enough."""
    begin, ids = encode_prompt(tokenizer, ""), encode_with_special(tokenizer, text)
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


def encode_chat(
    tokenizer: Tokenizer, path: str | os.PathLike, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Make a prompt of a chat, up to where the model's answer begins.

    Args:
        tokenizer: of the model.
        path: its file, beside which the template is.
        messages: each with a `role` and a `content`, as the template asks for.

    Returns:
        The ids, with BOS where the template writes it.

    Raises:
        UserError: no template, one that cannot be read or that refuses these messages, or no
            Jinja.
    """
    template, config = _template(Path(path).parent)
    names = {key: _name(value) for key, value in config.items() if key.endswith("_token")}
    return encode_with_special(tokenizer, _render(template, messages, names))


def _render(template: str, messages: Sequence[Mapping[str, Any]], names: dict[str, str]) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("messages need the library jinja2: pip install jinja2") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # As transformers runs them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **names
        )
    except Exception as error:  # whatever a stranger's template does
        raise UserError(
            f"the model's chat template does not take these messages: {error}"
        ) from None


def _template(folder: Path) -> tuple[str, dict[str, Any]]:
    """The template, and the configuration of the tokenizer."""
    config = _json(folder / _CONFIG)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), config
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found}.get("default")
    if not isinstance(found, str):
        raise UserError(
            f"messages need the model's chat template, and there is none beside its tokenizer in "
            f"{folder}: expected chat_template.jinja, or chat_template in {_CONFIG}"
        )
    return found, config


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _name(token: Any) -> str:
    """The text of a token that is given as text, or as an object with more about it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
