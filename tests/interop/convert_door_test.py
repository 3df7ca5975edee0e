"""`python -m dmc_jax.convert`: what it prints, its exit codes, and nothing left where it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dmc_jax.data.tokenizer import train_sentencepiece
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.formats import open_source
from tests.doors import runs_of
from tests.interop.checkpoint_files import assert_same_bits, read_safetensors, write_checkpoint
from tests.interop.reference_llama import Sizes, random_weights, with_decisions

ROOT = Path(__file__).parents[2]
SIZES = Sizes(V=300)
TEXT = "the cache merges a token into its newest slot "


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def convert(*flags):
    command = [sys.executable, "-W", "error", "-m", "dmc_jax.convert", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


def error_of(result, code=2):
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dense model and a DMC model of the same weights, with a tokenizer each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    weights = with_decisions(random_weights(SIZES, np.float32), SIZES)
    for name in ("dense", "dmc"):
        write_checkpoint(folder / name, SIZES, weights)
        train_sentencepiece([TEXT * 50], 280, folder / name / "tokenizer.model")
    settings = {"window": 4, "temperature": 0.1, "offset": 1.0, "eps": 0.01, "threshold": 0.5}
    (folder / "dmc/dmc_config.json").write_text(
        json.dumps({"format": "dmc_jax.dmc", "version": 1} | settings)
    )
    return folder


def a_dmc_model_goes_there_and_back_through_the_door_test(checkpoints, tmp_path):
    ours, back = tmp_path / "deep" / "ours", tmp_path / "back"
    there = convert(f"--input={checkpoints / 'dmc'}", f"--output={ours}")
    assert (there.returncode, there.stderr) == (0, "")
    assert "huggingface, Llama, DMC, window 4, offset 1, merging above 0.5" in there.stdout
    parameters = sum(array.size for array in read_safetensors_of(checkpoints / "dmc"))
    assert f"{parameters:,} parameters in float32" in there.stdout
    assert "tokenizer: tokenizer.model" in there.stdout
    assert re.search(rf"^writing {ours}: (\d+\.\d) of \1 MB$", there.stdout, re.M)
    home = convert(f"--input={ours}", f"--output={back}")  # our own goes out by default
    assert (home.returncode, home.stderr) == (0, "")
    assert f"wrote {back} (huggingface" in home.stdout
    first, last = open_source(checkpoints / "dmc"), open_source(back)
    assert first.policy == last.policy
    assert_same_bits(read_safetensors(back), {name: t.read() for name, t in first.tensors.items()})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "deep"]
    assert [p.name for p in ours.parent.iterdir()] == ["ours"]


def read_safetensors_of(folder):
    return [tensor.read() for tensor in open_source(folder).tensors.values()]


def verify_tells_the_same_model_from_another_test(checkpoints, tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    write_dmc_jax(open_source(checkpoints / "dmc"), ours, None, lambda _: None)
    same = convert(
        "--verify",
        f"--input={checkpoints / 'dmc'}",
        f"--against={ours}",
        "--prompt=the cache merges",
        "--prompt=its newest slot is a token",
        "--tolerance=0",
    )
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.count("same top token    100.0 %") == 2
    assert re.search(r"^same: largest difference 0, tolerance 0$", same.stdout, re.M)
    other = convert(
        "--verify",
        f"--input={checkpoints / 'dense'}",
        f"--against={ours}",
        "--prompt=the cache merges a token into its newest slot",
    )
    assert (other.returncode, other.stderr) == (1, "")
    found = re.search(r"KL by position    ([\d. e+-]+) nats", other.stdout)
    divergence = [float(value) for value in found[1].split()]
    positions = int(re.search(r": (\d+) positions", other.stdout)[1])
    assert len(divergence) == positions > 5 and max(divergence) > 0.01
    assert re.search(r"^DIFFERENT: largest difference \d.*, tolerance 0.0001$", other.stdout, re.M)


def mistakes_are_one_line_and_leave_nothing_test(checkpoints, tmp_path):
    dense = checkpoints / "dense"
    broken = tmp_path / "broken"
    write_checkpoint(broken, hidden_size=32)
    cases = [
        ([f"--input={dense}"], "--output is missing"),
        ([f"--input={dense}", "--from=meta", f"--output={tmp_path / 'x'}"], "params.json"),
        ([f"--input={broken}", f"--output={tmp_path / 'x'}"], "its config asks for"),
        (["--verify", f"--input={dense}"], "--verify needs --against=PATH and --prompt=TEXT"),
    ]
    for result, (_, message) in zip(
        runs_of("convert", *(flags for flags, _ in cases)), cases, strict=True
    ):
        assert message in error_of(result), result
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def being_stopped_leaves_nothing_test(number, tmp_path):
    weights = random_weights(Sizes(V=60_000, D=256, F=256))
    write_checkpoint(tmp_path / "hf", Sizes(V=60_000, D=256, F=256), weights)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "dmc_jax.convert"]
    command += [f"--input={tmp_path / 'hf'}", f"--output={out / 'ours'}"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)  # somewhere in the middle
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert list(out.iterdir()) == []


def a_tokenizer_can_be_named_and_must_fit_test(tmp_path):
    write_checkpoint(tmp_path / "hf", Sizes(V=290))
    for size in (280, 300):
        train_sentencepiece([TEXT * 50], size, tmp_path / f"{size}.model")
    flags = [f"--input={tmp_path / 'hf'}", f"--output={tmp_path / 'out'}", "--to=huggingface"]
    assert "has 300 ids, the model 290" in error_of(
        convert(*flags, f"--tokenizer={tmp_path / '300.model'}")
    )
    result = convert(*flags, f"--tokenizer={tmp_path / '280.model'}", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (tmp_path / "280.model").read_bytes()
    assert {a.dtype for a in read_safetensors(tmp_path / "out").values()} == {np.dtype("float32")}
