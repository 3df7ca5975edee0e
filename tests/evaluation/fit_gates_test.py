"""`python -m dmc_jax.fit_gates`: from a pretrained model and text to a file that the doors take."""

import dataclasses
import json

import pytest

from dmc_jax.checkpoints.gates import load_gates
from tests.doors import runs_of

SIZES = "--delay=3", "--length=48", "--windows=6", "--measured=4"


@pytest.fixture(scope="module")
def fitted(finished_run, data, tmp_path_factory):
    file = tmp_path_factory.mktemp("gates") / "small.gates"
    base = f"--checkpoint={finished_run}/pretrain", f"--data={data.path}"
    [result] = runs_of("fit_gates", [*base, f"--output={file}", *SIZES])
    assert (result.returncode, result.stderr) == (0, "")
    return file, result.stdout


def what_is_printed_is_what_the_file_says_test(fitted, model_config):
    file, said = fitted
    gates = load_gates(file, dataclasses.replace(model_config, kv_heads=2))
    assert gates.policy.delay == 3
    assert gates.table[0].ratio == pytest.approx(1.0)
    ratios = [entry.ratio for entry in gates.table]
    assert ratios == sorted(ratios) and ratios[-1] > 1.5
    for entry in gates.table:
        rise = entry.figures["perplexity_percent"]
        line = f"threshold {entry.threshold:4g}: ratio {entry.ratio:.2f}, perplexity {rise:+.1f} %"
        assert line in said
    assert gates.about["fitted_tokens"] == 6 * 48 and gates.about["length"] == 48
    assert "--delay=3" in gates.about["machine"]["command"]


def a_ratio_that_is_asked_for_is_measured_again_test(fitted, finished_run, model_config):
    file, _ = fitted
    base = f"--checkpoint={finished_run}/pretrain", f"--gates={file}"
    wanted = 1.4
    measured, refused, alone = runs_of(
        "evaluate",
        [*base, "--length=48", "--windows=4", f"--ratio={wanted}", "--json"],
        [*base, "--ratio=99"],
        [base[0], "--ratio=2"],
    )
    found = json.loads(measured.stdout)["evaluation"]
    assert found["ratio"] == pytest.approx(wanted, rel=0.15)
    assert refused.returncode == 2 and "these gates were measured from 1 to" in refused.stderr
    assert alone.returncode == 2 and "or a file of gates, not with dense" in alone.stderr
    prompt = "--prompt=some words and more of them", "--max_new_tokens=20"
    [said] = runs_of("decode", [*base, f"--ratio={wanted}", *prompt, "--json"])
    result = json.loads(said.stdout)
    assert said.returncode == 0 and result["ratio"] > 1.1


def what_cannot_be_fitted_is_refused_in_a_line_test(finished_run, data, other_data, tmp_path):
    output = f"--output={tmp_path}/x.gates"
    dense, merging = (f"--checkpoint={finished_run}/{stage}" for stage in ("pretrain", "retrofit"))
    texts = f"--data={data.path}"
    cases = [
        ([merging, texts, output], "merges already"),
        ([dense, f"--data={other_data.path}", output], "another tokenizer than"),
        ([dense, texts, output, "--length=500"], "--length: the model reads 64 tokens, got 500"),
        ([dense, texts, output, "--length=30"], "no token has 32 queries"),
        ([dense, texts, f"--output={tmp_path}/no/x.gates", *SIZES], "there is no folder"),
        ([dense, texts, output, "--windows=0"], "windows"),
    ]
    results = runs_of("fit_gates", *(arguments for arguments, _ in cases))
    for result, (_, complaint) in zip(results, cases, strict=True):
        assert result.returncode == 2 and complaint in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
