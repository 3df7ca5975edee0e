"""`dmc COMMAND` and what all commands have in common."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmc_jax import commands

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    file.stem for file in (ROOT / "dmc_jax").glob("*.py") if "commands.run(main" in file.read_text()
)


def start(*arguments: str, cwd: Path = ROOT, module: str = "dmc_jax") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-Werror", "-m", module, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def helps_exit_code_is_0_and_it_lists_the_flags_test(tmp_path):
    """Of `dmc COMMAND`, run from a folder that has nothing."""
    processes = [start(command, "--help", cwd=tmp_path) for command in COMMANDS]
    for command, process in zip(COMMANDS, processes, strict=True):
        code, out, err = outcome(process)
        assert (code, err) == (0, "")
        source = (ROOT / f"dmc_jax/{command}.py").read_text()
        if "EngineFlags()" in source:
            source += (ROOT / "dmc_jax/inference/engine_flags.py").read_text()
        defined = re.findall(r'DEFINE(?:_\w+\(|\(\s*commands.PATH,)\s*"(\w+)"', source)
        defined += re.findall(r"commands\.define_(config)\(", source)
        shown = re.findall(r"^  --(?:\[no\])?(\w+):", out, re.MULTILINE)
        assert defined and sorted(defined) == sorted(shown)
        if command == "train":
            for about in ("7b_8x,", "--config.data.path=data/stdlib  folder(s) made by"):
                assert about in out


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["alone", "help"])
def dmc_lists_its_commands_test(arguments):
    code, out, err = outcome(start(*arguments))
    assert (code, err) == (0, "")
    assert sorted(re.findall(r"^  (\w+)  +[A-Z]\w+", out, re.MULTILINE)) == COMMANDS


def a_command_that_does_not_exist_gets_one_line_test():
    code, out, err = outcome(start("trian", "--config=7b_8x"))
    assert (code, out) == (2, "")
    complaint, _, named = err.partition("; expected one of ")
    assert complaint == "error: there is no command 'trian'"
    assert sorted(named.strip().split(", ")) == COMMANDS


def what_must_be_given_is_named_test():
    """Every command that has required flags; `train` and `decode` look at theirs themselves."""
    found = {}
    for command in COMMANDS:
        source = (ROOT / f"dmc_jax/{command}.py").read_text()
        required = re.findall(r'PATH,\s*"(\w+)",[^()]*?required=True', source)
        if required:
            found[command] = set(required), start(command)
    assert len(found) >= 3
    for required, process in found.values():
        code, out, err = outcome(process)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert set(re.findall(r"--(\w+)", err)) == required | {"flag", "help"}
        assert err.startswith("error: --") and "None" not in err


def an_arena_of_a_model_that_is_not_there_says_so_in_a_line_test(tmp_path):
    code, out, err = outcome(
        start("arena", "--config=arena_smollm2", f"--config.checkpoint={tmp_path}/none")
    )
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: no complete checkpoint in {tmp_path}/none")


@pytest.mark.parametrize(
    "stop, code", [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)]
)
def a_command_that_was_stopped_says_by_what_test(stop, code, capsys):
    def stopped():
        raise stop

    with pytest.raises(SystemExit) as ended:
        commands.in_a_line(stopped)
    assert (ended.value.code, capsys.readouterr().err) == (code, "error: interrupted\n")


def a_field_that_no_config_has_is_named_test():
    """At the top and within: libraries quote what they say once for each level."""
    wrong = ("--config.ratios=3", "'ratios'"), ("--config.retrofit.stepz=3", "'stepz' Did you mean")
    running = [start("train", "--config=tiny_4x", flag) for flag, _ in wrong]
    for process, (_, told) in zip(running, wrong, strict=True):
        code, out, err = outcome(process)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: no field of the config: {told}") and err.count("\n") == 1
