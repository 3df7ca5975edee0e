"""Only a program that comes to its end passes, whatever it says or does on the way."""

import time

import pytest

from dmc_jax.errors import UserError
from dmc_jax.evaluation import judge
from dmc_jax.evaluation.judge import isolation, verdict

FAILS = {
    "a false assertion": "assert 1 + 1 == 3",
    "no Python": "def f(:",
    "an exit that says all is well": "import sys; sys.exit(0)",
    "one without goodbye": "import os; os._exit(0)",
    "one inside of a test": "def f(): raise SystemExit(0)\nassert f() == 1",
    "words that sound like success": "print('passed\\n' * 9, flush=True)\nassert False",
    "such words on every channel": "import os\nfor n in range(16):\n"
    "    try: os.write(n, b'passed')\n    except OSError: pass\nassert False",
    "endless recursion": "def f(): f()\nf()",
    "a huge allocation": "x = bytearray(2 ** 33)",
    "many of them": "x = []\nwhile True: x.append(bytearray(2 ** 24))",
    "a child": "import os\nif os.fork() == 0:\n    while True: pass",
    "children without end": "import os\nwhile True: os.fork()",
    "a thread": "import _thread; _thread.start_new_thread(print, ())",
    "a file": "open('here', 'w').write('x')",
    "a question to the user": "input()",
    "a signal to its parent": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("program", FAILS.values(), ids=FAILS.keys())
def what_does_not_come_to_its_end_fails_test(program):
    assert verdict(program) == "failed"


def what_comes_to_its_end_passes_test(capfd):
    # It prints a lot, to both streams, and is not heard.
    program = "import sys, math, re\nfor _ in range(99999): print('x' * 9, file=sys.stderr)"
    assert verdict(f"{program}\nprint('y' * 99999)\nassert math.floor(2.5) == 2") == "passed"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def what_takes_too_long_is_stopped_test(program, monkeypatch):
    monkeypatch.setattr(judge, "_WALL", 2)
    began = time.monotonic()
    assert verdict(program, seconds=1) == "timed out"
    assert time.monotonic() - began < 20


def even_what_does_not_want_to_stop_test():
    program = "import signal\nfor n in (15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert verdict(program, seconds=1) in ("timed out", "failed")


def a_program_finds_nothing_of_ours_test(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    program = """
import os, sys
assert "SECRET" not in os.environ and os.listdir() == []
assert not [path for path in sys.path if path.endswith("site-packages")]
assert sys.stdin.read() == "" and __name__ != "__main__"
"""
    assert verdict(program) == "passed"


@pytest.mark.skipif(not isolation(), reason="the system lets no one cut off the network here")
def the_network_is_cut_off_test():
    devices = "names = [line.split(':')[0].strip() for line in open('/proc/net/dev')][2:]"
    assert verdict(f"{devices}\nassert names == ['lo']") == "passed"


def nothing_is_run_where_limits_do_not_hold_test(monkeypatch):
    isolation.cache_clear()
    monkeypatch.setattr(judge, "_PROBE", "raise OSError('a child could be started')")
    try:
        with pytest.raises(
            UserError, match=r"do not hold on this machine \(OSError: a child could"
        ):
            verdict("x = 1")
    finally:
        isolation.cache_clear()
