"""A report holds the run's figures; its pictures are pictures."""

import json

import matplotlib.image
import numpy as np
import pytest

from dmc_jax.checkpoints.metadata import Metadata, to_json
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.evaluation.report import write_report
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC

STEPS = {"pretrain": 40, "zero_out": 5, "retrofit": 20, "finetune": 30}


def figures(by_head, loss=2.3456):
    slots = [sum(1 / r for r in row) for row in by_head]
    heads = sum(map(len, by_head))
    return {
        "loss": loss,
        "perplexity": 10.4398,
        "bits_per_byte": 1.1234,
        "tokens": 1000,
        "windows": 4,
        "ratio": heads / sum(slots),
        "ratio_by_layer": [len(row) / s for row, s in zip(by_head, slots, strict=True)],
        "ratio_by_head": by_head,
    }


def make_run(path, stages, by_head, target=4.0):
    """A made-up run: what `train` leaves behind, without the arrays."""
    path.mkdir()
    config = {"name": "made_up", "stages": ",".join(STEPS), "compression": {"ratio": target}}
    config |= {stage: {"steps": steps} for stage, steps in STEPS.items()}
    (path / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, sum(STEPS[s] for s in stages) + 1):
        line = {"step": step, "loss": None if step == 7 else 2 + 1 / step, "learning_rate": 1e-3}
        if step > 45:
            line |= {"ratio": 3.5, "target_ratio": 4.0, "compression_loss": 0.01}
        lines.append(json.dumps(line))
    # The last line of a killed run may be half a line.
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "lo']))
    for stage in stages:
        folder = path / stage / str(STEPS[stage])
        merges = stage in ("retrofit", "finetune")
        measured = figures(by_head if merges else [[1.0] * len(row) for row in by_head])
        about = Metadata(
            stage=stage,
            step=STEPS[stage],
            model=PRESETS["tiny"],
            policy=DMC(DMCSettings(), -0.375) if merges else Dense(),
            compute_dtype="float32",
            # zero_out was interrupted before it was measured
            validation=None if stage == "zero_out" else measured,
        )
        for name, content in (
            ("_CHECKPOINT_METADATA", {}),
            ("state/_METADATA", {}),
            ("data/metadata", {}),
            ("metadata/metadata", to_json(about)),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))
    return path


def a_report_holds_the_figures_of_every_stage_test(tmp_path):
    run = make_run(tmp_path / "run", STEPS, [[7.25, 3.5], [2.125]])
    report = write_report(run)
    assert report == run / "report"
    text = (report / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| finetune"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["finetune", "30", "2.3456", "10.440", "1.1234", "3.35x", "-0.375"]
    assert "not measured" in next(x for x in text.splitlines() if x.startswith("| zero_out"))
    layers = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines()[-4:-2]]
    assert layers == [["0", "4.72", "7.25", "3.50"], ["1", "2.12", "2.12", ""]]
    assert text.count("Warning") == 1 and "The target was missed: 3.355 tokens" in text
    summary = json.loads((report / "report.json").read_text())
    assert [s["stage"] for s in summary["stages"]] == list(STEPS)
    assert summary["stages"][3]["validation"]["ratio_by_head"] == [[7.25, 3.5], [2.125]]
    assert summary["stages"][1]["validation"] is None
    assert (summary["target_ratio"], summary["collapse"]) == (4.0, None)


def the_pictures_decode_and_show_something_test(tmp_path):
    report = write_report(make_run(tmp_path / "run", STEPS, [[7.25, 3.5], [2.125]]))
    for name in ("curves.png", "ratio_per_head.png"):
        picture = matplotlib.image.imread(report / name)
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


def a_run_that_never_merges_has_no_heatmap_test(tmp_path):
    run = make_run(tmp_path / "run", ["pretrain"], [[7.25, 3.5], [2.125]])
    (run / "report").mkdir()
    (run / "report" / "ratio_per_head.png").write_text("of an earlier run")
    report = write_report(run)
    assert (report / "curves.png").exists()
    assert not (report / "ratio_per_head.png").exists()
    assert "ratio_per_head" not in (report / "report.md").read_text()


def the_warning_of_a_collapse_reaches_the_report_test(tmp_path):
    report = write_report(make_run(tmp_path / "run", STEPS, [[1.0, 1.1], [90.0]]))
    warning = json.loads((report / "report.json").read_text())["collapse"]
    assert "layer 0 hardly merges" in warning
    assert f"**Warning.** {warning}" in (report / "report.md").read_text()


def a_folder_that_is_no_run_is_refused_test(tmp_path):
    with pytest.raises(UserError, match="is not a run's directory"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", [], [[1.0]])
    with pytest.raises(UserError, match="no complete checkpoint"):
        write_report(run)
