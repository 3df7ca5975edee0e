"""Conversations as a model reads them: rendered by its own chat template, in a sandbox."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError

# Before this version a template, which comes with a download, could leave Jinja's sandbox.
_JINJA = (3, 1, 6)
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def load_chat_template(tokenizer: Path, *, answer_next: bool = False) -> Render | None:
    """Load the chat template that lies beside a tokenizer's file.

    It is looked for in chat_template.jinja, chat_template.json and tokenizer_config.json, in this
    order. Templates see what transformers' `apply_chat_template` shows them, but for today's date:
    the same conversation must give the same text tomorrow.

    Args:
        tokenizer: the file.
        answer_next: end with what precedes the model's answer, as prompts do.

    Returns:
        A function from a conversation, a list of objects with "role" and "content", to its text,
        which raises ValueError where the template has none for it. None where there is no template.

    Raises:
        UserError: a template or a file that cannot be read, or no Jinja.
    """
    config = _read_json(tokenizer.parent / "tokenizer_config.json")
    where, source = _find(tokenizer.parent, config)
    if source is None:
        return None
    environment = _environment(where)
    try:
        template = environment.from_string(source)
    except Exception as error:  # the template's own mistakes can be of any kind
        raise UserError(f"{where}: not a chat template that Jinja reads ({error})") from None
    names = {name: text for name in _NAMES if (text := _text_of_token(config.get(name)))}

    def render(messages: Sequence[Any]) -> str:
        if not messages or not all(
            isinstance(message, Mapping) and isinstance(message.get("role"), str)
            for message in messages
        ):
            raise ValueError("expected a list of objects with role and content")
        try:
            return template.render(messages=messages, add_generation_prompt=answer_next, **names)
        except Exception as error:
            raise ValueError(f"the chat template refuses it: {error}") from None

    return render


def encode_chat(
    tokenizer: Tokenizer, path: str | os.PathLike, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Make a prompt of a conversation, up to where the model's answer begins.

    Args:
        tokenizer: of the model.
        path: its file, beside which the chat template lies.
        messages: objects with "role" and "content", as the template asks for.

    Returns:
        Ids, with BOS where the template writes it.

    Raises:
        UserError: no template, one that cannot be read or that refuses these messages, no Jinja.
    """
    render = load_chat_template(Path(path), answer_next=True)
    if render is None:
        raise UserError(
            f"messages need the model's chat template, and there is none beside its tokenizer in "
            f"{Path(path).parent}: expected chat_template.jinja, or chat_template in "
            "tokenizer_config.json"
        )
    try:
        return tokenizer.encode_special(render(messages))
    except ValueError as error:
        raise UserError(f"messages: {error}") from None


def _find(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str | None]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason})") from None
    file = folder / "chat_template.json"
    found = _read_json(file).get("chat_template")
    if found is None:
        file, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):  # several, with their names
        named = (entry for entry in found if isinstance(entry, dict))
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(found, str | None):
        raise UserError(f"{file}: expected a text as chat_template, or a list of named ones")
    return file, found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def _text_of_token(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _version(library) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", library.__version__)[:3]))


def _environment(where: Path):
    try:
        import jinja2
    except ImportError:
        jinja2 = None
    if jinja2 is None or _version(jinja2) < _JINJA:
        wanted = ".".join(map(str, _JINJA))
        raise UserError(f"{where}: rendering it needs Jinja; run `pip install 'jinja2>={wanted}'`")
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model said; it renders as what it holds."""

        tags = frozenset(["generation"])

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    return environment
