"""A program of its own, which `judge` starts: runs another one under limits.

What it is to run comes in from standard input, after a line with a word. It writes that word to a
pipe once the program has come to its end, and only then.
"""

import importlib
import os
import resource
import sys

# Loaded before root becomes nobody, who may not be allowed to read where Python lies.
_LIKELY = (
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib"),
    *("heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string"),
    *("time", "typing"),
)

_NOBODY = 65534


def main(channel: int, seconds: int, memory: int) -> None:
    """Run what is on standard input.

    Args:
        channel: the pipe.
        seconds: of CPU time.
        memory: bytes of address space.
    """
    word, program = sys.stdin.buffer.read().decode().split("\n", 1)
    for name in _LIKELY:
        importlib.import_module(name)
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if os.geteuid() == 0:  # whom the kernel lets start processes without end
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(channel, word.encode())
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
