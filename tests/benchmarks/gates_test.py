"""The benchmark of gates on a tiny model: what it measures, against whom, and how often."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gates as benchmark
from dmc_jax.checkpoints.gates import load_gates, save_gates
from dmc_jax.checkpoints.models import open_model
from dmc_jax.evaluation.side_by_side import budget_of_mean, single_windows
from dmc_jax.interop.formats import open_source
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import attend_whole
from tests.interop.gates_files import write_gates
from tests.tiny_run import make_data, save_model

T, WINDOWS, RATIO = 64, 4, 1.5
OTHERS = ["TOVA", "StreamingLLM"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def data(folder):
    return make_data(folder, 320, seed=0, words=(150, 200))


@pytest.fixture(scope="module")
def model(folder, data):
    return open_model(save_model(data, folder / "model"))


@pytest.fixture(scope="module")
def files(folder, model):
    """Of two seeds, in the directories of their runs, under one name."""
    first, second = (folder / name / "gates.safetensors" for name in ("seed5", "seed6"))
    for file in (first, second):
        file.parent.mkdir()
    stored = load_gates(write_gates(first, open_source(model.path)), model.config)
    gates = dataclasses.replace(stored.policy.gates, weight=-stored.policy.gates.weight)
    policy = dataclasses.replace(stored.policy, gates=gates)
    save_gates(second, dataclasses.replace(stored, policy=policy))
    return [first, second]


@pytest.fixture
def run(model, data, monkeypatch):
    """Takes files of gates and an output; gives its JSON and the policies measured."""

    def main(files, output):
        policies, measure = [], benchmark.measure

        def counted(*args, policy, **options):
            policies.append(policy)
            return measure(*args, policy=policy, **options)

        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "measure", counted)
            common = f"--checkpoint={model.path}", f"--data={data.path}", f"--output={output}"
            sizes = f"--lengths={T}", f"--windows={WINDOWS}", f"--batch={WINDOWS}"
            ratios = "--ratios", str(RATIO), "99"
            what = "--split=train", "--others", *OTHERS, "--gates", *map(str, files)
            benchmark.main([*common, *sizes, *ratios, *what])
        return json.loads(output.read_text()), policies

    return main


@pytest.fixture
def record(run, files, folder):
    return run(files, folder / "all.json")[0]


def a_ratio_is_measured_with_each_file_and_once_with_the_others_test(record):
    gated = [row for row in record["rows"] if "asked" in row]
    assert [(row["method"], row["asked"]) for row in gated] == [("seed5", RATIO), ("seed6", RATIO)]
    others = [(row["method"], row["budget"]) for row in record["rows"] if "like" in row]
    assert sorted(others) == [(n, b) for n in sorted(OTHERS) for b in ("end", "grows", "mean")]
    assert all(row["windows"] == WINDOWS == len(row["rises"]) for row in record["rows"])


def slots_are_those_that_the_budgets_name_test(record):
    ours = record["rows"][0]
    t = np.arange(1, T + 1)
    budgets = {
        "grows": np.maximum(16, t // ours["ratio_at_end"]),
        "end": round(ours["end_slots"]),
        "mean": budget_of_mean(ours["mean_slots"], T),
    }
    for row in record["rows"]:
        if "like" in row:
            assert row["slots_of"] == ours["method"]
            slots = np.minimum(t, budgets[row["budget"]])
            assert row["end_slots"] == slots[-1], row
            assert row["mean_slots"] == pytest.approx(slots.mean(), abs=1e-3)
            if row["budget"] == "mean":
                assert row["mean_slots"] == pytest.approx(ours["mean_slots"], abs=0.5)
            else:
                assert abs(row["end_slots"] - ours["end_slots"]) < 1


def rows_are_paired_with_the_dense_model_by_window_test(record, model, data, files):
    some = single_windows(data, "train", T, WINDOWS)

    def nats(policy):
        attend = attend_whole(policy, model.config, jnp.asarray(some["positions"]))
        tokens = jnp.asarray(some["tokens"])
        output = Llama(model.config).apply({"params": model.params}, tokens, attend=attend)
        rates = np.asarray(jax.nn.log_softmax(output.prediction.logits))
        return -np.take_along_axis(rates, some["targets"][..., None], 2)[..., 0]

    dense = nats(Dense())
    assert record["dense_nats"][str(T)] == pytest.approx(dense.mean(), abs=1e-3)
    for file, row in zip(files, record["rows"][:: len(record["rows"]) - 1], strict=True):
        rises = (nats(load_gates(file, model.config).at(RATIO)) - dense).mean(axis=1)
        assert np.abs(rises).max() > 1e-3
        np.testing.assert_allclose(row["rises"], rises, atol=2e-5)
        percent = 100 * math.expm1(rises.mean())
        assert row["perplexity_percent"] == pytest.approx(percent, abs=5e-3)


def a_second_run_measures_only_what_is_left_test(run, files, tmp_path):
    file = tmp_path / "gates.json"
    first, policies = run(files[:1], file)
    assert len(policies) == 1 + len(first["rows"]) == 1 + 1 + 3 * len(OTHERS)
    again, policies = run(files[:1], file)
    assert again["rows"] == first["rows"] and policies == [Dense()]
    both, policies = run(files, file)  # a seed more
    assert both["rows"][:-1] == first["rows"] and len(policies) == 2
    file.write_text(json.dumps(both | {"rows": both["rows"][:3]}))
    assert len(run(files, file)[1]) == 1 + len(both["rows"]) - 3


def gates_that_cannot_be_told_apart_and_figures_of_others_are_refused_test(
    run, files, tmp_path, capsys
):
    run(files[:1], tmp_path / "one.json")
    text = (tmp_path / "one.json").read_text()
    for given, complaint in (
        (files[1:], "one.json is of other text or gates: name another --output"),
        ([files[0], files[0]], "cannot be told apart, got seed5, seed5"),
    ):
        with pytest.raises(SystemExit):
            run(given, tmp_path / "one.json")
        assert complaint in capsys.readouterr().err
    assert (tmp_path / "one.json").read_text() == text


def no_place_of_this_machine_is_written_test(record):
    assert not re.search(r'["=,: ]/', json.dumps(record))
    assert "--checkpoint=" in record["machine"]["command"]


def a_summary_has_means_over_seeds_and_differences_on_the_same_windows_test():
    def row(method, rises, **about):
        rises = np.array(rises)
        figures = {"perplexity_percent": 100 * math.expm1(rises.mean()), "ratio_at_end": 2.0}
        case = {"length": 512, "windows": 2, "method": method, "rises": rises.tolist()}
        return case | figures | about

    rows = [
        row("a0", [0.01, 0.03], asked=2.0),
        row("TOVA", [0.10, 0.14], like=2.0, budget="end", slots_of="a0"),
        row("H2O", [0.20, 0.20], like=2.0, budget="mean", slots_of="a0"),
        row("a1", [0.03, 0.05], asked=2.0),
        row("b", [0.5, 0.5], asked=4.0),
    ]
    kinds = {"a0": {"kind": "a"}, "a1": {"kind": "a"}, "b": {"kind": "b"}}
    table = benchmark.summary({"gates": kinds, "rows": rows}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0][5:] == ["perplexity", "slots", "TOVA", "H2O"]
    # Means over seeds: 0.02 and 0.04; TOVA is 0.08 and 0.10 above them, H2O 0.18 and 0.16.
    ours = "+3.0 ± 2.0 % (+2.0 to +4.1)"
    assert cells[2] == ["512", "2", "2x", "a", "2.00x", ours, "end", "+9.4 ± 2.0 %", ""]
    assert cells[3] == ["512", "2", "2x", "a", "2.00x", ours, "mean", "", "+18.5 ± 2.0 %"]
    assert cells[4] == ["512", "2", "4x", "b", "2.00x", "+64.9 ± 0.0 %", "", "", ""]
    assert len(cells) == 5
