"""What a run came to, for people: plots, tables, and the same figures as JSON."""

import json
import os
from pathlib import Path

from dmc_jax.checkpoints.metadata import load_metadata
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.config import GATED, MERGING, STAGES
from dmc_jax.errors import UserError
from dmc_jax.evaluation import times
from dmc_jax.evaluation.plots import curves, heatmap
from dmc_jax.evaluation.tables import collapse, head_table, missed_target, table


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write RUN/report: `report.md`, `report.json`, `curves.png` and `ratio_per_head.png`.

    Read from RUN/config.json, RUN/metrics.jsonl and the newest checkpoint of every stage; a stage
    that was not finished has no figures yet. Without a stage that merges there is no heatmap.

    Args:
        run_dir: a run's directory, as `train` returns it.

    Returns:
        The report's folder.

    Raises:
        UserError: not a run's directory, or one without a checkpoint.
    """
    run_dir = Path(run_dir)
    run = _read_run(run_dir)
    found = {stage: latest(run_dir / stage) for stage in STAGES}
    stages = [load_metadata(ref) for ref in found.values() if ref is not None]
    if not stages:
        raise UserError(f"{run_dir} holds no complete checkpoint yet: nothing to report")
    # The model that the run is for: the last that merges and was measured.
    final = next(
        (m for m in reversed(stages) if m.stage in (*MERGING, *GATED) and m.validation), None
    )
    measured = final and final.validation
    target = run["compression"]["ratio"]
    warning = measured and collapse(measured["ratio_by_layer"], target)
    missed = measured and missed_target(measured["ratio"], target)

    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    metrics = _read_metrics(run_dir)
    curves(run, metrics, stages).savefig(report / "curves.png")
    picture = report / "ratio_per_head.png"
    if measured is None:
        picture.unlink(missing_ok=True)  # of an earlier run that was started afresh
    else:
        heatmap(measured, target, f"{run['name']}, {final.stage}").savefig(picture)
    summary = {
        "name": run["name"],
        "target_ratio": target,
        "collapse": warning,
        "missed_target": missed,
        "time": times.sum_up(metrics),
        "stages": [
            {
                "stage": m.stage,
                "step": m.step,
                "mode": m.policy.name,
                "threshold": getattr(m.policy, "threshold", 0.0),
                "validation": m.validation,
            }
            for m in stages
        ],
    }
    (report / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    (report / "report.md").write_text(_markdown(summary, measured))
    return report


def _read_run(run_dir: Path) -> dict:
    try:
        return json.loads((run_dir / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{run_dir} is not a run's directory: it has no readable config.json, which "
            "dmc_jax.train writes"
        ) from None


def _read_metrics(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def _markdown(summary: dict, measured: dict | None) -> str:
    header = ("stage", "steps", "loss", "perplexity", "bits per byte", "ratio", "threshold")
    lines = []
    for stage in summary["stages"]:
        figures = stage["validation"]
        if figures is None:
            lines.append((stage["stage"], f"{stage['step']:,}", *["not measured"] * 4, ""))
            continue
        lines.append(
            (
                stage["stage"],
                f"{stage['step']:,}",
                f"{figures['loss']:.4f}",
                f"{figures['perplexity']:.3f}",
                f"{figures['bits_per_byte']:.4f}",
                f"{figures['ratio']:.2f}x",
                f"{stage['threshold']:.4g}" if stage["mode"] == "dmc" else "",
            )
        )
    parts = [
        f"# {summary['name']}",
        "On validation text, with the decisions of inference. Loss in nats a token; ratio in "
        f"tokens per cache slot, wanted {summary['target_ratio']:g}x.",
        table(header, lines, left=("stage",)),
    ]
    warnings = filter(None, (summary["collapse"], summary["missed_target"]))
    parts += [f"**Warning.** {warning}" for warning in warnings]
    parts.append("![Training curves](curves.png)")
    if measured is not None:
        parts += [
            "## Tokens per slot by layer and KV head",
            head_table(measured),
            "![Tokens per slot by layer and KV head](ratio_per_head.png)",
        ]
    if summary["time"]:
        parts += times.section(summary["time"])
    return "\n\n".join(parts) + "\n"
