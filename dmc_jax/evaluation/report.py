"""What a run came to, for people: plots, tables, and the same figures as JSON."""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmc_jax.config import STAGES, ModelConfig
from dmc_jax.errors import UserError
from dmc_jax.evaluation.perplexity import Evaluation
from dmc_jax.training.run_directory import latest, load_metadata

# Blue, orange and green of Okabe and Ito's palette, which colour-blind readers can tell apart.
_MEASURED, _TARGET, _OTHER = "#0072B2", "#D55E00", "#009E73"
_QUIET = "#8A8A8A"
_INCHES_PER_CELL = 0.62, 0.36
_COMPARED_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One model in a `comparison_table`."""

    name: str
    steps: int  # optimizer steps since the common starting point
    evaluation: Evaluation
    config: ModelConfig
    note: str = ""


# ---- the report folder ------------------------------------------------------------------------


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
    final = next((m for m in reversed(stages) if m["mode"] == "dmc" and "validation" in m), None)
    measured = None if final is None else final["validation"]
    target = run["compression"]["ratio"]
    warning = None if measured is None else collapse(measured["ratio_by_layer"], target)

    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    _curves(run, _read_metrics(run_dir), stages).savefig(report / "curves.png")
    heatmap = report / "ratio_per_head.png"
    if measured is None:
        heatmap.unlink(missing_ok=True)  # of an earlier run that was started afresh
    else:
        _heatmap(measured, target, f"{run['name']}, {final['stage']}").savefig(heatmap)
    summary = {
        "name": run["name"],
        "target_ratio": target,
        "collapse": warning,
        "stages": [
            {key: m.get(key) for key in ("stage", "step", "mode", "threshold", "validation")}
            for m in stages
        ],
    }
    (report / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    (report / "report.md").write_text(_markdown(summary, measured))
    return report


def collapse(ratio_by_layer: Sequence[float], target: float) -> str | None:
    """Say whether a few layers do all the merging, which a good overall ratio can hide.

    Args:
        ratio_by_layer: tokens per slot of every layer.
        target: wanted tokens per slot of the whole model.

    Returns:
        A sentence if some layer is below 1.2x while another exceeds ten times the target, else
        None.
    """
    low, high = int(np.argmin(ratio_by_layer)), int(np.argmax(ratio_by_layer))
    least, most = ratio_by_layer[low], ratio_by_layer[high]
    if least >= 1.2 or most <= 10 * target:
        return None
    return (
        f"Layers collapsed: layer {low} hardly merges ({least:.2f}x) while layer {high} merges "
        f"nearly everything ({most:.1f}x, target {target:g}x)."
    )


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


# ---- tables -----------------------------------------------------------------------------------


def comparison_table(rows: Sequence[ComparisonRow]) -> str:
    """Models side by side, as a Markdown table.

    Args:
        rows: models measured on the same text; the first is what the others are compared with.

    Returns:
        One line a model: steps, nats a token, bits per byte, these relative to the first model's,
        tokens per slot, bytes of 2-byte keys and values for 256 tokens, note.
    """
    base = rows[0].evaluation.bits_per_byte
    lines = []
    for row in rows:
        measured = row.evaluation
        cache = measured.cache_bytes(row.config, _COMPARED_TOKENS)
        lines.append(
            (
                row.name,
                f"{row.steps:,}",
                f"{measured.loss:.4f}",
                f"{measured.bits_per_byte:.4f}",
                "" if row is rows[0] else f"{100 * (measured.bits_per_byte / base - 1):+.2f} %",
                f"{measured.ratio:.2f}x",
                f"{cache:,.0f}",
                row.note,
            )
        )
    header = (
        "model",
        "steps",
        "nats a token",
        "bits per byte",
        f"against {rows[0].name}",
        "ratio",
        f"cache bytes at {_COMPARED_TOKENS} tokens",
        "note",
    )
    return _table(header, lines, left=("model", "note"))


def machine(command: str) -> dict:
    """What figures were measured on, for the JSON files that hold them.

    Args:
        command: what was typed.
    """
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "command": command,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table whose source is aligned too; columns not named in `left` are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def row(cells):
        aligned = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(cells, widths, header, strict=True)
        )
        return f"| {' | '.join(aligned)} |"

    rule = (
        "-" * (width + 2) if name in left else "-" * (width + 1) + ":"
        for width, name in zip(widths, header, strict=True)
    )
    return "\n".join((row(header), f"|{'|'.join(rule)}|", *map(row, lines)))


def head_table(measured: dict) -> str:
    """Tokens per slot of every layer and KV head, as a Markdown table.

    Args:
        measured: an `Evaluation` as a dictionary, of which `ratio_by_layer` and `ratio_by_head`
            are read.
    """
    heads = max(map(len, measured["ratio_by_head"]))
    header = ("layer", "all heads", *(f"head {i}" for i in range(heads)))
    lines = [
        (str(layer), f"{whole:.2f}", *(f"{r:.2f}" for r in ratios), *[""] * (heads - len(ratios)))
        for layer, (whole, ratios) in enumerate(
            zip(measured["ratio_by_layer"], measured["ratio_by_head"], strict=True)
        )
    ]
    return _table(header, lines)


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
        _table(header, lines, left=("stage",)),
    ]
    if summary["collapse"]:
        parts.append(f"**Warning.** {summary['collapse']}")
    parts.append("![Training curves](curves.png)")
    if measured is not None:
        parts += [
            "## Tokens per slot by layer and KV head",
            head_table(measured),
            "![Tokens per slot by layer and KV head](ratio_per_head.png)",
        ]
    return "\n\n".join(parts) + "\n"


# ---- plots ------------------------------------------------------------------------------------


def _curves(run: dict, metrics: list[dict], stages: list[dict]) -> Figure:
    """Loss, ratio, compression loss and learning rate over the steps of the whole run."""
    ends = _stage_ends(run, stages)
    names = ["loss", "ratio", "compression_loss", "learning_rate"]
    names = [n for n in names if n in ("loss", "learning_rate") or any(n in m for m in metrics)]
    heights = [1.6 if name in ("loss", "ratio") else 1.0 for name in names]
    figure = Figure(figsize=(9, 1.3 + 1.6 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for name, axes in zip(names, panels, strict=True):
        _plot(axes, metrics, name, _MEASURED, "training" if name == "loss" else "measured")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(_LABELS[name])
        for end in ends.values():
            axes.axvline(end, color=_QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.margins(x=0)
    _plot_validation(panels[0], stages, ends)
    if "ratio" in names:
        axes = panels[names.index("ratio")]
        _plot(axes, metrics, "target_ratio", _TARGET, "target", linestyle="--")
        axes.legend(frameon=False, loc="upper left")
    begin = 0
    for stage, end in ends.items():
        _name_span(panels[0], stage.replace("_", "-"), begin, end)
        begin = end
    panels[0].set_xlim(0, max(begin, 1))
    panels[-1].set_xlabel("step")
    figure.suptitle(run["name"], fontweight="bold")
    return figure


_LABELS = {
    "loss": "loss (nats a token)",
    "ratio": "tokens per slot",
    "compression_loss": "compression\nloss",
    "learning_rate": "learning rate",
}


def _stage_ends(run: dict, stages: list[dict]) -> dict[str, int]:
    """Last step of every stage in the directory, counted over the run as metrics.jsonl does."""
    names = [stage["stage"] for stage in stages]
    ends = np.cumsum([run[name]["steps"] for name in names])
    return {name: int(end) for name, end in zip(names, ends, strict=True)}


def _plot(axes: Axes, metrics: list[dict], name: str, colour: str, label: str, **style) -> None:
    # JSON's null is a number that was not finite: a gap in the line.
    points = [(m["step"], np.nan if m[name] is None else m[name]) for m in metrics if name in m]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4, **style)


def _plot_validation(axes: Axes, stages: list[dict], ends: dict[str, int]) -> None:
    points = [
        (ends[m["stage"]], m["validation"]["loss"])
        for m in stages
        if "validation" in m and m["stage"] in ends
    ]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=_TARGET, label="validation", clip_on=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")


def _name_span(axes: Axes, name: str, begin: int, end: int) -> None:
    """A stage's name above its part of the axis; slanted, since short stages are narrow."""
    axes.annotate(
        name,
        (0.5 * (begin + end), 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        rotation=25,
        rotation_mode="anchor",
        ha="left",
        color=_QUIET,
        fontsize=9,
    )


def _heatmap(measured: dict, target: float, title: str) -> Figure:
    """Layers by KV heads, coloured by tokens per slot on a logarithmic scale around the target."""
    rows = measured["ratio_by_head"]
    heads = max(map(len, rows))
    ratios = np.full((len(rows), heads), np.nan)
    for layer, row in enumerate(rows):
        ratios[layer, : len(row)] = row
    width, height = _INCHES_PER_CELL
    size = max(4.5, 1.8 + width * heads), max(2.6, 1.4 + height * len(rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.patch.set(facecolor="#F4F4F4", edgecolor="#D0D0D0", hatch="////")  # where no head is
    logs = np.log2(ratios)
    # White is the target: what merges more is blue, what merges less is red.
    reach = max(1.0, float(np.nanmax(np.abs(logs - np.log2(target)))))
    low, high = np.log2(target) - reach, np.log2(target) + reach
    image = axes.imshow(logs, cmap="RdBu", vmin=low, vmax=high, aspect="auto")
    for (layer, head), ratio in np.ndenumerate(ratios):
        if np.isfinite(ratio):
            dark = abs(logs[layer, head] - np.log2(target)) > 0.6 * reach
            text = f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"
            colour = "white" if dark else "black"
            axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(heads), yticks=range(len(rows)))
    figure.suptitle(title, fontweight="bold")
    axes.set_title(f"{measured['ratio']:.2f} tokens per slot", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=f"tokens per slot (white: target {target:g})")
    ticks = np.arange(np.ceil(max(low, 0.0)), np.floor(high) + 1)  # no ratio is below 1
    bar.ax.set_ylim(max(low, 0.0), high)
    bar.set_ticks(ticks, labels=[f"{2**t:g}" for t in ticks])
    bar.outline.set_visible(False)
    return figure
