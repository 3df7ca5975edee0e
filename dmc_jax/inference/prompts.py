"""What the decode command is given: prompts in a file, sizes such as 2GiB."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from dmc_jax.errors import UserError
from dmc_jax.inference.sampling import SamplingParams

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class PromptLine(NamedTuple):
    """A prompt, and how to continue it."""

    prompt: str
    params: SamplingParams


def read_prompts(path: str | os.PathLike, params: SamplingParams) -> list[PromptLine]:
    """Read a JSON Lines file of prompts.

    A line is a string, or an object with a `prompt` and any fields of `SamplingParams`.

    Args:
        path: of the file; "-": standard input.
        params: what a line does not say.

    Raises:
        UserError: no file, no prompt in it, or a line that is neither.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from error
    lines = enumerate(text.splitlines(), start=1)
    prompts = [_prompt_line(line, f"{path}, line {n}", params) for n, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: expected one JSON value a line")
    return prompts


def _prompt_line(line: str, where: str, params: SamplingParams) -> PromptLine:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    fields = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{where}: expected a string, or an object with a text "prompt"')
    fields = {
        name: tuple(entry) if isinstance(entry, list) else entry for name, entry in fields.items()
    }
    prompt = fields.pop("prompt")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if strange := sorted(set(fields) - known):
        raise UserError(f"{where}: no field {strange[0]!r}; there is {', '.join(sorted(known))}")
    try:
        return PromptLine(prompt, dataclasses.replace(params, **fields))
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


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
