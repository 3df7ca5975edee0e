"""The quickstart in an empty folder: as a program that finds its package, then as a notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# It trains for longer than it compiles, on one device.
ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = subprocess.run(
        [sys.executable, EXPERIMENTS / "quickstart.py"],
        cwd=folder,
        env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def ratio_in(printed: str) -> float:
    return float(re.search(r"^DMC: .* ratio (\d+\.\d+)$", printed, re.MULTILINE)[1])


@pytest.mark.slow
def the_quickstart_trains_a_model_that_compresses_test(ran):
    folder, printed = ran
    assert ratio_in(printed) > 1.5
    assert (folder / "runs/quickstart/report/ratio_per_head.png").is_file()


@pytest.mark.slow
# What Jupyter's libraries warn of is theirs to mend.
@pytest.mark.filterwarnings("default")
def the_notebook_says_what_the_program_said_test(ran, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder, printed = ran
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS.parent), prepend=os.pathsep)
    notebook = nbformat.read(EXPERIMENTS / "quickstart.ipynb", as_version=4)
    where = {"metadata": {"path": str(folder)}}  # where the models are trained already
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert ratio_in(text) == ratio_in(printed)
    assert any("image/png" in output.get("data", ()) for output in outputs)
