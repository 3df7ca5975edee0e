"""`python -m dmc_jax.evaluate` and `dmc_jax.decode` on a run that was really trained."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmc_jax.checkpoints.metadata import load_metadata, write_metadata
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.evaluation.report import write_report
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from tests.doors import runs_of

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def door(name, *arguments, folder=ROOT):
    command = [sys.executable, "-W", "error", "-m", f"dmc_jax.{name}", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
    )


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
        expected = load_metadata(ref).validation
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


def evaluate_measures_a_policy_that_was_not_trained_beside_the_dense_model_test(finished_run):
    dense = f"--checkpoint={finished_run}/pretrain"
    arguments = "--policy=window", "--budget=6", "--ratio=2.5", "--windows=8"
    result, shown, *refused = runs_of(
        "evaluate",
        [dense, *arguments, "--json"],
        [dense, *arguments],
        [dense, "--policy=h2o"],
        [dense, "--ratio=2"],
        [dense, "--policy=tova", "--ratio=0.5"],
        [dense, "--budget=8"],
        [dense, "--policy=snapkv", "--ratio=2"],
    )
    assert (result.returncode, result.stderr) == (0, "")
    about = json.loads(result.stdout)
    policy = {"name": "window", "budget": 6, "ratio": 2.5, "sinks": 4, "channel_scale": None}
    assert about["policy"] == policy and 1.5 < about["evaluation"]["ratio"] <= 2.7
    assert ", step 2, window, budget 6, ratio 2.5)" in shown.stdout
    assert about["dense"]["evaluation"]["ratio"] == 1
    assert about["dense"]["checkpoint"] == about["checkpoint"]
    complaints = (
        "budget: give the slots of a row with tova, h2o, window or snapkv, or a ratio",
        "ratio: give it with tova, h2o, window, snapkv, stride or a file of gates, not with dense",
        "ratio: expected 1 to 1,000,000 tokens for a slot, got 0.5",
        "budget: give the slots of a row with tova, h2o, window or snapkv, not with dense",
        "prompt: snapkv cuts a prompt at its end: say how many tokens",
    )
    for run, complaint in zip(refused, complaints, strict=True):
        assert complaint in one_line_of_error(run) and run.stdout == ""


def evaluate_measures_pages_of_int8_beside_the_dense_model_as_it_is_test(finished_run):
    dense, narrow = f"--checkpoint={finished_run}/pretrain", "--kv_dtype=int8"
    result, shown, refused = runs_of(
        "evaluate",
        [dense, narrow, "--windows=8", "--json"],
        [f"--checkpoint={finished_run}", narrow, "--windows=8"],
        [dense, narrow, "--policy=tova", "--budget=8"],
    )
    assert (result.returncode, result.stderr) == (0, "")
    about = json.loads(result.stdout)
    assert (about["dtype"], about["kv_dtype"]) == ("float32", "int8")
    ours, exact = about["evaluation"]["loss"], about["dense"]["evaluation"]["loss"]
    assert 0 < abs(ours - exact) < 1e-2
    assert "predicted in float32, keys and values in int8\n" in shown.stdout
    assert "--kv_dtype: whole sequences with tova are not rounded" in one_line_of_error(refused)


def evaluate_refuses_what_it_cannot_measure_test(finished_run, other_data, tmp_path):
    moved = latest(shutil.copytree(finished_run / "retrofit", tmp_path / "moved/retrofit"))
    about = dataclasses.replace(load_metadata(moved), data=str(tmp_path / "gone"))
    write_metadata(moved, about)
    results = runs_of(
        "evaluate",
        [f"--checkpoint={finished_run}", f"--data={other_data.path}"],
        [f"--checkpoint={tmp_path / 'nowhere'}"],
        [f"--checkpoint={moved.path}"],
    )
    complaints = ("another tokenizer", "no complete checkpoint", "say where it is with --data=DIR")
    for result, complaint in zip(results, complaints, strict=True):
        assert complaint in one_line_of_error(result) and result.stdout == ""


def evaluate_of_tasks_without_their_library_says_how_to_get_it_test(finished_run, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('lm_eval is not here')")
    [result] = runs_of(
        "evaluate", [f"--checkpoint={finished_run}", "--tasks=piqa"], folder=tmp_path
    )
    [wanted] = re.findall(r"^lm-eval==\S+", (ROOT / "requirements-parity.txt").read_text(), re.M)
    assert one_line_of_error(result) == (
        "error: --tasks needs lm-evaluation-harness (lm_eval is not here): run `pip install "
        f"{wanted}`"
    )


SUMMARY = re.compile(
    r"\n\n(\d+) prompt tokens, (\d+) new; first token after (\d+\.\d\d) s, (\d+\.\d) tokens/s; "
    r"(\d+\.\d\d) tokens per slot: ([\d,]+) bytes of cache in use, dense ([\d,]+)\n$"
)


def decode_prints_the_text_and_what_it_took_test(finished_run):
    prompt = "the cache merges"
    arguments = f"--checkpoint={finished_run}", f"--prompt={prompt}", "--max_new_tokens=12"
    result = door("decode", *arguments, "--temperature=0", "--page_size=8")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(prompt)
    numbers = (float(x.replace(",", "")) for x in SUMMARY.search(result.stdout).groups())
    prompt_tokens, new, first, _, ratio, live, dense = numbers
    assert new <= 12 and first > 0 and ratio >= 1
    # 4 rows of pages of 8 slots: keys and values of 8 channels and 4 bytes.
    page_bytes = 8 * 2 * 8 * 4
    assert dense == -(-(prompt_tokens + new - 1) // 8) * 4 * page_bytes
    assert live % page_bytes == 0 and 4 * page_bytes <= live <= dense


def decode_keeps_to_a_budget_of_slots_with_a_policy_that_was_not_trained_test(finished_run):
    arguments = f"--checkpoint={finished_run}", "--prompt=the cache merges", "--temperature=0"
    budget = "--policy=tova", "--budget=8", "--page_size=8", "--max_new_tokens=12"
    result = door("decode", *arguments, *budget)
    assert (result.returncode, result.stderr) == (0, "")
    *_, live, dense = (x.replace(",", "") for x in SUMMARY.search(result.stdout).groups())
    assert int(live) == 4 * 8 * 2 * 8 * 4 < int(dense)  # a page in each of 4 rows


def decode_continues_a_file_of_prompts_each_as_it_would_alone_test(finished_run, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output.jsonl"
    prompts.write_text(
        '"the cache"\n\n{"prompt": "a token", "seed": 3, "max_new_tokens": 5, "temperature": 1}\n'
    )
    common = f"--checkpoint={finished_run}", "--max_new_tokens=8", "--temperature=0"
    common = *common, "--page_size=8"  # the programs of the test before
    result = door("decode", *common, f"--prompts={prompts}", "--json", f"--output={output}")
    assert (result.returncode, result.stderr) == (0, "")
    by_index = sorted(map(json.loads, result.stdout.splitlines()), key=lambda x: x["index"])
    assert by_index == list(map(json.loads, output.read_text().splitlines()))
    first, second = by_index
    assert (first["prompt"], second["prompt"]) == ("the cache", "a token")
    assert second["new_tokens"] <= 5 and second["ratio"] >= 1
    (tmp_path / "prompt").write_text("the cache")
    alone = door("decode", *common, f"--prompt_file={tmp_path / 'prompt'}", "--nostream")
    assert f"[0] the cache{first['text']}\n" in alone.stdout


@pytest.fixture
def interruptible():
    """Ctrl-C reaches child processes even where ours was told to ignore it, as behind an `&`."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def decode_interrupted_prints_what_there_is_test(finished_run, tmp_path):
    output = tmp_path / "output.jsonl"
    arguments = f"--checkpoint={finished_run}", "--prompt=the cache", "--max_new_tokens=60"
    process = subprocess.Popen(
        [sys.executable, "-m", "dmc_jax.decode", *arguments, f"--output={output}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    # The prompt is there before the first token, for which a program has to be compiled.
    assert process.stdout.read(9) == "the cache"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    new = int(SUMMARY.search(out)[2])
    assert new < 60
    [line] = output.read_text().splitlines()
    assert json.loads(line)["finish_reason"] == "cancelled"
    assert json.loads(line)["new_tokens"] == new


def decode_refuses_bad_flags_before_it_loads_anything_test(tmp_path):
    cases = [
        (["--prompt=a", "--prompts=b"], "give one of --prompt, --prompt_file and --prompts"),
        (["--prompts=-"], "- has no prompt"),
        (["--prompt=a"], "`make demo-train` makes one"),
        (["--prompt=a", "--output=nowhere/x"], "cannot write --output=nowhere/x"),
        (["--prompt=x", "--checkpoint=nowhere"], "no complete checkpoint"),
    ]
    results = runs_of("decode", *(arguments for arguments, _ in cases), folder=tmp_path)
    for result, (_, complaint) in zip(results, cases, strict=True):
        assert complaint in one_line_of_error(result) and result.stdout == ""


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
    loss = load_metadata(latest(finished_run / "retrofit")).validation["loss"]
    assert f"{loss:.4f}" in text


def evaluate_measures_a_hugging_face_folder_as_the_checkpoint_it_came_from_test(
    finished_run, data, tmp_path
):
    write_huggingface(open_source(finished_run), tmp_path, None, lambda _: None)
    flags = ["--windows=8", "--length=32", "--json"]
    ours, theirs, dataless = runs_of(
        "evaluate",
        [f"--checkpoint={finished_run}", *flags],
        [f"--checkpoint={tmp_path}", f"--data={data.path}", *flags],
        [f"--checkpoint={tmp_path}", *flags],
    )
    assert "was not trained here: name a prepared folder with --data" in one_line_of_error(dataless)
    assert theirs.stderr == f"note: {tmp_path} is a huggingface checkpoint, read directly\n"
    measured, expected = (json.loads(run.stdout) for run in (theirs, ours))
    assert measured["evaluation"] == expected["evaluation"]
    assert (measured["mode"], measured["threshold"]) == ("dmc", expected["threshold"])
    assert measured["dense"] is None and expected["dense"] is not None
