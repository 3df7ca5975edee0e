"""`python -m dmc_jax.decode`: prompts in, results out, and nothing lost in between."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.checkpoints.models import find_model
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.config import RunConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.tokenizer import fingerprint, train_sentencepiece
from dmc_jax.model.llama import init_params
from dmc_jax.policies.dmc import DMC
from tests.doors import runs_of
from tests.tiny_llama import build

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random DMC model with a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("checkpoint")
    train_sentencepiece(["ab é€ " * 50], 266, root / "t.model")
    config = dataclasses.replace(build()[1], vocab_size=266)
    metadata = Metadata(
        stage="finetune",
        step=5,
        model=config,
        policy=DMC(DMCSettings(window=3, offset=0.0), 0.0),
        compute_dtype="float32",
        tokenizer=str(root / "t.model"),
        tokenizer_sha256=fingerprint(root / "t.model"),
    )
    with open_for_saving(root / "run", "finetune", keep=1) as saver:
        saver.save(5, {"params": init_params(config, jax.random.key(0))}, {}, metadata)
    return root / "run"


@pytest.fixture
def flags(checkpoint):
    return f"--checkpoint={checkpoint}", "--max_new_tokens=4", "--temperature=0"


def a_path_may_begin_at_home_test(checkpoint, tmp_path, monkeypatch):
    """No shell expands what stands behind `--flag=`."""
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    (checkpoint.parent / "prompt.txt").write_text("ab")
    [result] = runs_of(
        "decode",
        [
            *("--checkpoint=~/run", "--tokenizer=~/t.model", "--prompt_file=~/prompt.txt"),
            *("--output=~/out.jsonl", "--max_new_tokens=2"),
        ],
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert len(lines_of((checkpoint.parent / "out.jsonl").read_text())) == 1
    assert not list(tmp_path.iterdir())
    assert find_model("~/run").path == checkpoint / "finetune" / "5"
    run = RunConfig.named("paper:~/run,ratio=2")
    assert run.model == find_model(checkpoint).config
    assert dataclasses.replace(run, output="~/runs").output == f"{checkpoint.parent}/runs"


def lines_of(text):
    return [json.loads(line) for line in text.split("\n")[:-1]]


def a_bad_prompt_costs_that_prompt_and_is_named_test(flags, tmp_path):
    bad = [
        '"\\ud83d"',
        "{",
        '{"prompt": "a", "max_new_tokens": 2.5}',
        '{"prompt": "a", "max_new_tokens": 500}',
        '{"prompt": [1, 999]}',
    ]
    lines = ['"one"', "", *bad, '{"prompt": [1, 70, 71]}', '"two\u2028\u0085"']
    prompts, output = tmp_path / "prompts", tmp_path / "output"
    prompts.write_bytes("\r\n".join(lines).encode())
    common = *flags, f"--prompts={prompts}"
    [done, again] = runs_of(
        "decode",
        [*common, f"--output={output}", "--json"],
        [*flags, f"--prompts={output}", f"--output={tmp_path / 'again'}"],
    )
    assert done.returncode == 2
    results = lines_of(output.read_text())
    assert [(x["index"], x["line"]) for x in results] == list(enumerate([1, 3, 4, 5, 6, 7, 8, 9]))
    wrong = results[1:6]
    for result, message in zip(
        wrong, ["surrogate", "not JSON", "whole number", "exceed the 128", "token 999"], strict=True
    ):
        assert result["finish_reason"] == "error" and message in result["error"]
        assert f"error: {prompts}, {result['error']}" in done.stderr.splitlines()
        assert result["error"].startswith(f"line {result['line']}: ")
    assert [results[n]["prompt"] for n in (0, 6, 7)] == ["one", [1, 70, 71], "two\u2028\u0085"]
    assert all(results[n]["new_tokens"] for n in (0, 6, 7))
    assert sorted(lines_of(done.stdout), key=lambda x: x["index"]) == results
    # What it wrote it reads, and says the same again.
    second = lines_of((tmp_path / "again").read_text())
    assert again.returncode == 2 and len(second) == 8
    assert [second[n]["tokens"] for n in (0, 6, 7)] == [results[n]["tokens"] for n in (0, 6, 7)]


def pages_of_int8_take_a_quarter_and_their_scales_test(flags):
    wide, narrow, unknown = runs_of(
        "decode",
        [*flags, "--prompt=abba", "--json"],
        [*flags, "--prompt=abba", "--json", "--kv_dtype=int8"],
        [*flags, "--prompt=abba", "--kv_dtype=int4"],
    )
    results = [json.loads(run.stdout) for run in (wide, narrow)]
    assert results[0]["new_tokens"] == results[1]["new_tokens"] > 0
    # Heads of 16 numbers: 64 bytes are 16, and 4 for the scale.
    of_dense = [result["dense_cache_bytes"] for result in results]
    assert of_dense[1] / of_dense[0] == 20 / 64
    assert results[1]["live_cache_bytes"] <= of_dense[1]
    assert unknown.returncode == 2 and "kv_dtype" in unknown.stderr


def a_result_that_is_there_stays_until_a_new_one_is_complete_test(flags, tmp_path):
    output, prompts = tmp_path / "output", tmp_path / "prompts"
    output.write_text("old")
    prompts.write_text('"a"')
    to = f"--output={output}"
    link = tmp_path / "link"
    link.symlink_to(prompts)
    refused = runs_of(
        "decode",
        ["--checkpoint=mistyped", "--prompt=a", to],
        [*flags, "--prompt=a", to, "--policy=tova"],
        [*flags, f"--prompt={'a' * 200}", to],
        [*flags, "--prompt=a", to, "--existing=refuse"],
        [*flags, f"--prompts={prompts}", f"--output={link}"],
        [*flags, f"--prompt_file={prompts}", f"--output={prompts}"],
        [*flags, "--prompt=a", f"--output={tmp_path}"],
    )
    assert [(run.returncode, run.stdout) for run in refused] == [(2, "")] * len(refused)
    assert "exceed the 128" in refused[2].stderr and "is there already" in refused[3].stderr
    assert "is the file of prompts" in refused[4].stderr and "a folder" in refused[6].stderr
    assert (output.read_text(), prompts.read_text()) == ("old", '"a"')
    appended, replaced = (
        [*flags, "--prompt=a", to, "--existing=append"],
        [*flags, "--prompt=b", to],
    )
    for arguments, before in ((appended, "old\n"), (replaced, "")):
        [done] = runs_of("decode", arguments)
        assert (done.returncode, done.stderr) == (0, "")
        text = output.read_text()
        assert text.startswith(before) and len(lines_of(text.removeprefix(before))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "output", "prompts"]


def line_ends_of_a_prompt_are_kept_test(flags, tmp_path):
    (tmp_path / "prompt").write_bytes(b"a\r\nb\r")
    [done] = runs_of("decode", [*flags, f"--prompt_file={tmp_path / 'prompt'}", "--json"])
    assert json.loads(done.stdout)["prompt"] == "a\r\nb\r"


def a_threshold_decides_what_merges_and_a_length_what_is_refused_test(flags):
    common = *flags, "--prompt=abababab", "--json"
    never, always, short, of_dense = runs_of(
        "decode",
        [*common, "--threshold=1e9"],
        [*common, "--threshold=-1e9"],
        [*common, "--max_length=8"],
        [*common, "--threshold=0", "--policy=dense"],
    )
    assert json.loads(never.stdout)["ratio"] == 1 and json.loads(always.stdout)["ratio"] > 2
    assert "exceed the 8 that" in short.stderr and "threshold" in of_dense.stderr
    assert (short.returncode, of_dense.returncode) == (2, 2)


def chats_and_special_tokens_are_prompts_test(flags, checkpoint, tmp_path):
    prompts, config = tmp_path / "prompts", checkpoint.parent / "tokenizer_config.json"
    chat = [{"role": "user", "content": "ab"}]
    lines = [{"messages": chat}, {"messages": "ab"}, {"prompt": "<s>ab</s>"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    common = [*flags, f"--prompts={prompts}", "--json"]
    [plain] = runs_of("decode", common)
    config.write_text(json.dumps(names | {"chat_template": template}))
    [done] = runs_of("decode", [*common, "--special_tokens"])
    config.unlink()
    assert (plain.returncode, done.returncode) == (2, 2)
    assert f"error: {prompts}, line 1: messages need the model's chat template" in plain.stderr
    by_index = {x["index"]: x for x in lines_of(done.stdout)}
    assert by_index[0]["messages"] == chat and "prompt" not in by_index[0]
    assert 'expected a list such as [{"role"' in by_index[1]["error"]
    assert by_index[0]["tokens"] == by_index[2]["tokens"]
    assert by_index[0]["prompt_tokens"] == by_index[2]["prompt_tokens"] < 5


def program(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "dmc_jax.decode", *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **environment},
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("shown", ["--json", "--stream"])
def a_pipe_that_takes_ascii_alone_gets_escapes_test(flags, shown):
    prompt = "--prompt=é€😀"
    done = program(*flags, prompt, shown, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    if shown == "--json":
        assert json.loads(done.stdout)["prompt"] == "é€😀"
    else:
        assert done.stdout.startswith(rb"\xe9\u20ac\U0001f600")


def programs_are_kept_for_the_next_start_and_their_time_is_stated_test(
    flags, tmp_path, monkeypatch
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    kept = {}
    for start in range(2):
        done = program(*flags, "--prompt=a", **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\n\ncompiling took " in done.stdout
        kept[start] = {path.name for path in tmp_path.glob("dmc_jax/programs/*-cache")}

    # Whether a small program took long enough to be kept is a matter of how busy the machine is.
    def layers(start):
        return {name for name in kept[start] if name.startswith("jit__run_layer")}

    assert layers(0) and layers(0) == layers(1)
