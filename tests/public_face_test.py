"""`import dmc_jax as dmc`: what it names, and that it costs nothing until a name is used."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmc_jax as dmc

ROOT = Path(__file__).parents[1]


def in_a_fresh_process(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def importing_the_package_loads_nothing_else_test():
    loaded = in_a_fresh_process(
        "import sys; before = {*sys.modules}; import dmc_jax; print(*({*sys.modules} - before))"
    )
    packages = {name.split(".")[0] for name in loaded.split()}
    assert packages - sys.stdlib_module_names == {"dmc_jax"}


def every_name_is_there_and_no_other_test():
    for name in dmc.__all__:
        assert getattr(dmc, name) is getattr(dmc, name)
    assert dir(dmc) == sorted(dmc.__all__)
    with pytest.raises(AttributeError, match="'dmc_jax' has no attribute 'lode'"):
        dmc.lode  # noqa: B018


def type_checkers_see_the_same_names_test():
    stub = ast.parse((ROOT / "dmc_jax/__init__.pyi").read_text())
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == dmc._DEFINED
    public = next(node.value for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(public)) == sorted(dmc.__all__)


def a_function_is_not_lost_to_the_command_of_its_name_test():
    """Whichever is imported first."""
    in_a_fresh_process(
        """
import importlib, types
import dmc_jax as dmc
from dmc_jax.evaluation import perplexity
from dmc_jax.training import loop

assert dmc.train is loop.train
command = importlib.import_module("dmc_jax.train")
assert isinstance(command, types.ModuleType) and callable(command.main)
assert dmc.train is loop.train

command = importlib.import_module("dmc_jax.evaluate")
assert isinstance(command, types.ModuleType) and callable(command.main)
assert dmc.evaluate is perplexity.evaluate
from dmc_jax import evaluate, train
assert (evaluate, train) == (perplexity.evaluate, loop.train)

import dmc_jax.data  # any other module is an attribute of its package, as ever
assert isinstance(dmc.data, types.ModuleType)
""",
        "-Werror",
    )
