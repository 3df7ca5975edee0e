"""`python -m dmc_jax.train`: a mistake gets one line on stderr and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

from tests.doors import runs_of

ROOT = Path(__file__).parents[2]


def train(*flags, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "dmc_jax.train", *flags],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def mistakes_get_one_line_and_exit_code_2_test(tmp_path):
    cases = [
        (["--config.retrofti.steps=3"], "retrofti"),
        (["--config.compression.ratio=0.5"], "ratio must be at least 1"),
        (["--config.model.kv_heads=3"], "4 query heads cannot share 3 KV heads"),
        (["--config.model.head_dim=31"], "head_dim must be even"),
        (["--config.data.path=nowhere"], "nowhere is not a prepared data folder"),
        (["--config.data.batch=eight"], "eight"),
        (["stray"], "unexpected argument 'stray'"),
    ]
    cases = [(["--config=tiny_4x", *flags], message) for flags, message in cases]
    cases += [
        ([], "--config is missing"),
        (["--config=paper:7b"], "such as paper:7b,ratio=8"),
        (["--config=7b_8x", "--config.stages=pretrain"], "stages names pretrain, and the config"),
        (["--config=7b_8x", "--config.pretrain.steps=9"], "pretrain.steps can not be applied"),
    ]
    results = runs_of("train", *(flags for flags, _ in cases), folder=tmp_path)
    for result, (_, message) in zip(results, cases, strict=True):
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        assert result.returncode == 2, result
        assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert list(tmp_path.iterdir()) == []


def a_config_that_does_not_exist_gets_one_line_test(tmp_path):
    result = train("--config=configs/8b_4x.py", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "8b_4x.py" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
