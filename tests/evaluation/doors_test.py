"""`python -m dmc_jax.evaluate` and `dmc_jax.decode` on a run that was really trained."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmc_jax.evaluation.report import write_report
from dmc_jax.training.checkpoint import latest, load_metadata

ROOT = Path(__file__).parents[2]


def door(name, *arguments):
    command = [sys.executable, "-W", "error", "-m", f"dmc_jax.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def one_line_of_error(result):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


def evaluate_as_json_repeats_the_figures_of_training_beside_the_dense_model_test(finished_run):
    result = door("evaluate", f"--checkpoint={finished_run}", "--windows=8", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    for about, stage in ((found, "retrofit"), (found["dense"], "pretrain")):
        ref = latest(finished_run / stage)
        assert about["checkpoint"] == str(ref.path)
        expected = load_metadata(ref)["validation"]
        assert about["evaluation"] == {
            key: value if isinstance(value, list) else pytest.approx(value, rel=1e-5)
            for key, value in expected.items()
        }
    assert (found["mode"], found["split"], found["length"]) == ("dmc", "validation", 32)
    assert found["evaluation"]["ratio"] > 1 == found["dense"]["evaluation"]["ratio"]


def evaluate_says_so_where_the_dense_model_is_gone_test(finished_run, tmp_path):
    moved = tmp_path / "elsewhere" / "retrofit" / "2"
    moved.parent.mkdir(parents=True)
    moved.symlink_to(finished_run / "retrofit" / "2")
    result = door("evaluate", f"--checkpoint={moved}", "--windows=8", "--split=test")
    assert result.returncode == 0, result.stderr
    assert "name it with --dense=DIR" in result.stdout
    assert re.search(r"^bits per byte +\d+\.\d{4}$", result.stdout, re.M)
    assert re.search(r"^\| +1( \| +\d+\.\d\d){3} \|$", result.stdout, re.M)


def evaluate_refuses_text_of_another_tokenizer_test(finished_run, other_data):
    result = door("evaluate", f"--checkpoint={finished_run}", f"--data={other_data.path}")
    assert "another tokenizer" in one_line_of_error(result)


def decode_prints_the_text_and_what_it_took_test(finished_run):
    prompt = "the cache merges"
    arguments = f"--checkpoint={finished_run}", f"--prompt={prompt}", "--max_new_tokens=12"
    result = door("decode", *arguments, "--temperature=0")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(prompt)
    found = re.search(
        r"\n\n(\d+) prompt tokens, (\d+) new, \d+\.\d tokens/s; (\d+\.\d\d) tokens per slot: "
        r"([\d,]+) bytes of cache in use, dense ([\d,]+)\n$",
        result.stdout,
    )
    prompt_tokens, new, ratio, used, dense = (float(x.replace(",", "")) for x in found.groups())
    assert new <= 12
    # 4 rows x 8 channels x keys and values x 4 bytes; the last token is never read.
    assert dense == (prompt_tokens + new - 1) * 4 * 8 * 2 * 4
    assert ratio == pytest.approx(dense / used, abs=0.006)


@pytest.mark.parametrize("name", ["evaluate", "decode"])
def a_checkpoint_that_is_not_there_is_one_line_and_exit_code_2_test(name, tmp_path):
    extra = ["--prompt=x"] if name == "decode" else []
    result = door(name, f"--checkpoint={tmp_path / 'nowhere'}", *extra)
    assert "no complete checkpoint" in one_line_of_error(result)
    assert result.stdout == ""


def a_truncated_checkpoint_is_one_line_and_exit_code_2_test(finished_run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished_run, broken)
    for file in (latest(broken).path / "state").glob("**/d/*"):  # the arrays' bytes
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = door("evaluate", f"--checkpoint={broken}", "--windows=8")
    # TensorStore's threads may add that an event loop is closed, after our line.
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and result.stdout == ""
    assert "cannot read checkpoint" in errors[0] and "_read_array" not in result.stderr


def a_real_run_can_be_reported_test(finished_run):
    text = (write_report(finished_run) / "report.md").read_text()
    loss = load_metadata(latest(finished_run / "retrofit"))["validation"]["loss"]
    assert f"{loss:.4f}" in text
