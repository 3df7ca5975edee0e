"""What the commands share: running under absl, exit codes, flags, requests to stop."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dmc_jax.errors import Checklist, RunFailure, UserError

flags.disclaim_key_flags()  # a flag that is defined here is its command's, whose help lists it


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
    """Run a command's `main` under absl; expected failures become one line and an exit code.

    Exit codes: what `main` returns (None is 0); 2 for a `UserError`, an unknown or illegal flag or
    a stray argument; 1 for a `RunFailure` or an `OSError` such as a full disk; 130 for Ctrl-C,
    143 for SIGTERM: 128 and the number of the signal.
    Anything else is a defect of this program and keeps its traceback.

    Args:
        main: takes nothing (flags are read from `absl.flags.FLAGS`), returns an exit code or None.
        argv: the command line, program name first; `sys.argv` when None.

    Raises:
        SystemExit: with the exit code. After a known error of a real command line the process has
            ended by then.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe in the C locale takes ASCII alone
            stream.reconfigure(errors="backslashreplace")
    in_a_line(
        lambda: app.run(lambda _: main(), argv=argv, flags_parser=_parse_flags),
        at_once=argv is None,
    )


def in_a_line(work: Callable[[], object], *, at_once: bool = False) -> None:
    """Do something, such as a program with a parser of its own; failures end as those of `run`.

    Args:
        work: takes nothing.
        at_once: whether the process ends with a known error, and with it all threads.

    Raises:
        SystemExit: with the exit code.
    """
    lines = False
    try:
        work()
        return
    except (UserError, flags.Error) as error:
        lines = isinstance(error, Checklist)
        code, message = 2, str(error)
    except (RunFailure, OSError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt as stop:
        code, message = 128 + next(iter(stop.args), signal.SIGINT), "interrupted"
    # One write: threads of a library that failed may be writing too.
    sys.stderr.write(f"error: {message if lines else ' '.join(message.split())}\n")
    if at_once:
        # Leaves at once, or those threads go on to print tracebacks while Python winds up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


class _Path(flags.ArgumentParser):
    """Of a file or folder: no shell expands what stands behind `--flag=`."""

    syntactic_help = "a path; ~ is the user's home"

    def parse(self, argument: str) -> str:
        """The path without `~`."""
        return os.path.expanduser(argument)


PATH = _Path()  # for `flags.DEFINE`


class _ConfigParser(flags.ArgumentParser):
    """Takes whatever names a config; ml_collections' own takes a path."""

    def __init__(self, load: Callable[[str], Any]):
        self._load = load

    def parse(self, argument: str):
        return self._load(argument).lock()


def define_config(load: Callable[[str], Any], help_text: str, fields: Iterable[str]):
    """Define `--config`, of whose value flags such as `--config.data.batch=16` set fields.

    Args:
        load: gives the ConfigDict that a name stands for.
        help_text: what may be named.
        fields: a line about each field.
    """
    about = "\n".join((f"{help_text} Flags after it set its fields:", *fields))
    holder = config_flags.DEFINE_config_file("config", None, about)
    flags.FLAGS["config"].parser = _ConfigParser(load)
    return holder


def show_notes(notes: Iterable[str]) -> None:
    """Print what a user should know to standard error, a line each.

    Args:
        notes: a sentence each, such as those of `checkpoints.models.StoredModel`.
    """
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


# Ctrl-C; what `kill` and schedulers send; the terminal that goes away; what Slurm can warn with.
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def _ignores(name: str) -> bool:
    return hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN


@contextlib.contextmanager
def stop_requests(notice: str) -> Iterator[list[int]]:
    """A list that fills when a signal asks to stop; the second SIGINT stops at once.

    For work that may end between two steps only. SIGHUP is ignored where this process was started
    to ignore it, by nohup.

    Args:
        notice: logged when that is asked.
    """
    asked: list[int] = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        logging.info(notice)

    numbers = [getattr(signal, name) for name in _STOPPING if hasattr(signal, name)]
    ignored = {getattr(signal, "SIGHUP", None)} if _ignores("SIGHUP") else set()
    heard = [n for n in numbers if n not in ignored]
    try:
        previous = {n: signal.signal(n, ask) for n in heard}
    except ValueError:  # not the main thread: a notebook's worker, for instance
        previous = {}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse absl flags; unlike absl's own parser it does not print a usage page or exit 1."""
    try:
        left = flags.FLAGS(argv)
    except SystemExit:  # once absl has printed the help that was asked for; its code says 1
        raise SystemExit(0) from None
    except flags.IllegalFlagValueError as error:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
        if not missing:
            raise
        raise UserError(
            f"{' and '.join(missing)} must be given, as --flag=value; see --help"
        ) from None
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        # ml_collections' ways of saying that a field does not exist, or cannot be set
        inner, reason = error, error
        while isinstance(reason, BaseException) and reason.args:
            inner, reason = reason, reason.args[-1]
        text = str(reason)
        raise UserError(
            f"no field of the config: {text}" if isinstance(inner, KeyError) else text.strip("'\"")
        ) from error
    if len(left) > 1:
        raise UserError(
            f"unexpected argument {left[1]!r}: this command takes --flag=value only; see --help"
        )
    return left
