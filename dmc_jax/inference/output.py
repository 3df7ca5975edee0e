"""The file of results: whole under its name; as they come, they are in one beside it."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dmc_jax.errors import UserError
from dmc_jax.files import appears_when_complete
from dmc_jax.inference.prompts import PromptLine
from dmc_jax.inference.requests import Result

EXISTING = ("replace", "append", "refuse")


class Output(NamedTuple):
    """Where results go."""

    path: Path
    existing: str  # of EXISTING: what to do with a file that is there

    @property
    def partial(self) -> Path:
        """The file that results go to as they come."""
        return self.path.with_name(self.path.name + ".partial")

    @property
    def is_stream(self) -> bool:
        """Whether it is a pipe or a device, which has no name to take."""
        return self.path.exists() and not self.path.is_file()


def check_output(name: str, existing: str, inputs: list[str]) -> Output:
    """Refuse what results cannot go to. Touches nothing.

    Args:
        name: of the file.
        existing: what to do with a file that is there.
        inputs: files that are read.

    Raises:
        UserError: no folder for it, a folder itself, an input, or a file that is there and stays.
    """
    path = Path(os.path.realpath(name))
    if Path(name).exists() and not Path(name).is_file():
        path = Path(name)  # where /dev/stdout leads to a pipe, that has no path of its own
    if any(path == Path(os.path.realpath(one)) for one in inputs):
        raise UserError(f"--output={name} is the file of prompts: name another one")
    if path.is_dir():
        raise UserError(f"cannot write --output={name}: it is a folder")
    if not path.parent.is_dir():
        raise UserError(f"cannot write --output={name}: there is no folder {path.parent}")
    output = Output(path, existing)
    writable = path if output.is_stream else path.parent
    if not os.access(writable, os.W_OK):
        raise UserError(f"cannot write --output={name}: no permission to write in {writable}")
    if existing == "refuse" and path.is_file():
        raise UserError(f"--output={name} is there already: name another, or see --existing")
    return output


@contextlib.contextmanager
def results_file(output: Output | None) -> Iterator[Callable[[int, str], None]]:
    """Give a function that writes a result: its index among the prompts, and its line.

    Results are in the partial file as they come, and in the order of the prompts in the end. After
    an error or `KeyboardInterrupt` a file that was there is as before, and the partial one stays.

    Args:
        output: where to; None: nowhere.

    Raises:
        UserError: another process writes the same file.
        OSError: it cannot be written.
    """
    if output is None:
        yield lambda index, line: None
        return
    if output.is_stream:
        with output.path.open("w", encoding="utf-8") as file:
            yield lambda index, line: print(line, file=file, flush=True)
        return
    lines: dict[int, str] = {}
    with output.partial.open("a", encoding="utf-8", newline="\n") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing {output.partial}") from error
        file.truncate(0)

        def write(index: int, line: str) -> None:
            lines[index] = line
            print(line, file=file, flush=True)

        try:
            yield write
        except BaseException:
            if not lines:
                output.partial.unlink()
            raise
        _finish(output, [lines[index] for index in sorted(lines)])
        output.partial.unlink()


def _finish(output: Output, lines: list[str]) -> None:
    before = b""
    if output.existing == "append" and output.path.exists():
        before = output.path.read_bytes()
        before += b"" if before.endswith(b"\n") or not before else b"\n"
    with appears_when_complete(output.path) as whole:
        whole.write_bytes(before + "".join(f"{line}\n" for line in lines).encode())


def as_json(
    index: int, line: PromptLine, result: Result | None, error: str | None, *, ascii_only: bool
) -> str:
    """Write a result, or what was wrong with its prompt, as a line of JSON.

    Args:
        index: of the prompt, from 0.
        line: the prompt.
        result: what became of it.
        error: instead of a result.
        ascii_only: write other characters as escapes.
    """
    values: dict[str, Any] = {"index": index}
    values |= {} if line.line is None else {"line": line.line}
    values |= {"messages": line.messages} if line.messages else {"prompt": line.prompt}
    if result is None:
        values |= {"error": error, "finish_reason": "error"}
    else:
        values |= dataclasses.asdict(result)
    text = json.dumps(values, ensure_ascii=ascii_only)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a prompt that was refused for it
        return json.dumps(values)
    return text
