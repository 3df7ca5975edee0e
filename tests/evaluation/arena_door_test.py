"""The arena's command on a tiny model: what it writes, and that it goes on."""

import json

import pytest

from tests.doors import runs_of
from tests.tiny_run import make_data, save_model


@pytest.mark.slow
def text_and_serving_are_measured_and_a_second_run_measures_nothing_test(tmp_path):
    data = make_data(tmp_path, 320, seed=0, words=(150, 200))
    save_model(data, tmp_path / "model")
    flags = [
        "--config=arena_smollm2",
        f"--config.checkpoint={tmp_path}/model",
        "--config.gates=()",
        f"--config.text.data={data.path}",
        "--config.text.split=train",
        "--config.text.lengths=32",
        "--config.text.windows=2",
        "--config.ratios=2",
        "--config.others=StreamingLLM,SnapKV",
        "--config.kv_dtypes=float32",
        "--config.contests=text,serving",
        "--config.serving.prompt=32",
        "--config.serving.new_tokens=8",
        "--config.serving.requests=3",
        "--config.serving.kv_bytes=100000",
        f"--config.output={tmp_path}",
    ]
    other = save_model(data, tmp_path / "other", kv_heads=1)
    mixed = [*flags, f"--config.checkpoint={other}"]
    first, second, third = runs_of("arena", flags, flags, mixed, folder=tmp_path)
    assert first.returncode == second.returncode == 0, first.stderr
    folder = tmp_path / "arena_smollm2"
    assert {file.name for file in folder.iterdir()} == {"arena.json", "table.md", "quality.png"}
    rows = json.loads((folder / "arena.json").read_text())["rows"]
    assert [(row["contest"], row["method"]) for row in rows] == [
        ("text", "dense"),
        ("text", "StreamingLLM"),
        ("serving", "dense"),
        ("serving", "StreamingLLM"),
        ("serving", "SnapKV"),
    ]
    assert all(row["tokens_per_second"] > 0 and row["sequences"] > 1 for row in rows[2:])
    assert rows[1]["mean_bytes"] < rows[0]["mean_bytes"]
    assert first.stdout.count("\n{") + first.stdout.startswith("{") == 5
    assert "{" not in second.stdout and (folder / "table.md").read_text() in second.stdout
    assert third.returncode == 2 and "was measured with another model" in third.stderr
