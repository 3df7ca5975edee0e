"""Gates for a tiny model of the user's, from the user's text: as a program, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmc_jax.checkpoints.gates import load_gates
from dmc_jax.checkpoints.models import open_model
from tests.tiny_run import make_data, save_model

SCRIPT = Path(__file__).parents[2] / "experiments" / "retrofit_on_a_laptop.py"
RUN = Path("runs/model_gates_dms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model and texts of several windows each lie."""
    folder = tmp_path_factory.mktemp("laptop")
    save_model(make_data(folder, 320, seed=0, words=(200, 300)), folder / "model", max_length=256)
    return folder


def run(folder, *flags, inside=None):
    return subprocess.run(
        [sys.executable, SCRIPT, f"--checkpoint={folder}/model", "--length=64", *flags],
        cwd=inside or folder,
        env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def gates_are_made_measured_and_exported_and_a_second_run_goes_on_test(folder):
    flags = f"--text={folder}/texts", "--steps=3", "--ratio=1.5"
    first = run(folder, *flags)
    assert first.returncode == 0, first.stderr
    model = open_model(folder / "model" / "pretrain")
    gates = load_gates(folder / RUN / "gates.safetensors", model.config)
    assert gates.policy.name == "dms" and gates.about["distilled_tokens"] == 3 * 64
    report = json.loads((folder / RUN / "report" / "comparison.json").read_text())
    methods = [row["method"] for row in report["rows"]]
    assert list(dict.fromkeys(methods)) == [
        "dense",
        "ours",
        "TOVA",
        "H2O",
        "StreamingLLM",
        "Stride",
    ]
    ours, *others = report["rows"][1:9]
    assert ours["ratio_at_end"] > 1.2
    for row in others:
        assert abs(row["end_slots"] - ours["end_slots"]) < 1
    assert not report["went_on_from_an_earlier_run"] and report["steps"] == 3
    table = (folder / RUN / "report" / "comparison.md").read_text()
    assert table in first.stdout and "--- dense: " in first.stdout
    assert "--- 1.5x: " in first.stdout and str(RUN / "gates.safetensors") in first.stdout
    assert (folder / RUN / "report" / "quality.png").stat().st_size > 0
    exported = json.loads((folder / RUN / "huggingface" / "config.json").read_text())
    assert exported["gates"]["method"] == "dms"

    steps = (folder / RUN / "metrics.jsonl").read_text()
    again = run(folder, *flags)
    assert again.returncode == 0 and table in again.stdout
    assert (folder / RUN / "metrics.jsonl").read_text() == steps  # nothing was trained again
    assert "not exported: " in again.stdout and "huggingface exists" in again.stdout


def a_mistake_gets_a_line_before_anything_is_trained_test(folder, tmp_path):
    (tmp_path / "short").mkdir()
    for number in range(60):
        (tmp_path / "short" / f"{number}.txt").write_text(f"the cache {number}\n")
    refused = run(folder, f"--text={tmp_path}/short", inside=tmp_path)
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 1 and line.startswith("error: ") and "a window of 64" in line
    assert not (tmp_path / "runs").exists()
