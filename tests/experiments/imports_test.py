"""An experiment finds what it imports, from any folder and uninstalled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def an_experiment_finds_what_it_imports_test(script, tmp_path):
    imports = script.read_text().split("# %% [markdown]")[1]  # what stands before the first step
    assert "import dmc_jax" in imports or "from benchmarks" in imports
    result = subprocess.run(
        [sys.executable, "-c", f"__file__ = {str(script)!r}\n{imports}"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
