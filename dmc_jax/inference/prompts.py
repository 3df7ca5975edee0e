"""What the decode command is given: prompts in a file, sizes such as 2GiB."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from dmc_jax.errors import UserError
from dmc_jax.inference.requests import Result, check_text
from dmc_jax.inference.sampling import SamplingParams

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

_FIELDS = sorted(field.name for field in dataclasses.fields(SamplingParams))
_KNOWN = ", ".join(["prompt", "messages", *_FIELDS])
# Results are prompts too: what they say beside the prompt does not count.
_OF_RESULTS = {field.name for field in dataclasses.fields(Result)} | {"index", "line", "error"}


class PromptLine(NamedTuple):
    """A prompt, and how to continue it; or what is wrong with it."""

    prompt: str | list[int]  # text, or token ids as the model shall see them
    params: SamplingParams
    line: int | None = None  # of the file, from 1
    error: str | None = None  # with it, prompt and params are what could be read
    messages: list[dict[str, Any]] | None = None  # a chat instead of the prompt, which is empty


def read_prompts(path: str | os.PathLike, params: SamplingParams) -> list[PromptLine]:
    """Read a JSON Lines file of prompts.

    A line is a string, or an object with a `prompt` (a text, or a list of token ids) or `messages`
    (of a chat), and any fields of `SamplingParams`; those of a result are passed over. A line ends
    with a line feed and nothing else. What is wrong with one is said in its place.

    Args:
        path: of the file; "-": standard input.
        params: what a line does not say.

    Raises:
        UserError: no file, none in UTF-8, or no line of it is a prompt.
    """
    text = read_text(path, "prompts")
    lines = enumerate(text.split("\n"), start=1)
    prompts = [_prompt_line(line, number, params) for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: expected one JSON value a line")
    if all(line.error for line in prompts):
        raise UserError(f"{path}, {prompts[0].error}")
    return prompts


def read_text(path: str | os.PathLike, what: str) -> str:
    """Read a text file as it is, but for a byte order mark: line ends are kept.

    Args:
        path: of the file; "-": standard input.
        what: it holds, for the message.

    Raises:
        UserError: no such file, or none in UTF-8.
    """
    try:
        if str(path) == "-":
            data = getattr(sys.stdin, "buffer", sys.stdin).read()
        else:
            data = Path(path).read_bytes()
        text = data if isinstance(data, str) else data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {what} from {path}: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"cannot read {what} from {path}: it is not UTF-8 (line {line}); save it as UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _prompt_line(line: str, number: int, params: SamplingParams) -> PromptLine:
    prompt, messages = "", None
    try:
        value = _parse(line)
        fields = dict(value) if isinstance(value, dict) else {"prompt": value}
        if "messages" in fields and "prompt" not in fields:
            messages = _messages(fields.pop("messages"))
        else:
            prompt = _prompt(fields.pop("prompt", None))
        # A result says the ratio that it came to; elsewhere it is asked for.
        foreign = _OF_RESULTS if "finish_reason" in fields else _OF_RESULTS.difference(_FIELDS)
        fields = {name: x for name, x in fields.items() if name not in foreign}
        if strange := sorted(set(fields) - set(_FIELDS)):
            raise UserError(f"no field {strange[0]!r}; there is {_KNOWN}")
        check_text(json.dumps(messages, ensure_ascii=False) if messages else prompt)
        params = dataclasses.replace(params, **fields)
        return PromptLine(prompt, params, number, messages=messages)
    except UserError as error:
        return PromptLine(prompt, params, number, f"line {number}: {error}", messages)


def _parse(line: str) -> Any:
    try:
        return json.loads(line, strict=False)  # control characters as they are
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"expected one JSON value; this line is not JSON: {reason}") from error


def _prompt(value: Any) -> str | list[int]:
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if isinstance(value, str) or ids:
        return value
    raise UserError('expected a string, or an object with a text "prompt" or a list of token ids')


def _messages(value: Any) -> list[dict[str, Any]]:
    chat = isinstance(value, list) and value
    if not chat or not all(isinstance(x, dict) and isinstance(x.get("role"), str) for x in value):
        raise UserError(
            'messages: expected a list such as [{"role": "user", "content": "Hello"}], got '
            f"{json.dumps(value)[:80]}"
        )
    return value


def parse_bytes(text: str) -> int:
    """Count the bytes of a size such as 500MB, 2GiB or 1048576.

    Args:
        text: a number and a unit: B, kB, MB, GB (powers of 1000), KiB, MiB or GiB (of 1024).

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if not found:
        raise UserError(f"expected a size such as 2GiB, 500MB or 1048576, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])
