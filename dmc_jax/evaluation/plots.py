"""What a run came to, as pictures: curves over its steps, tokens per slot of every head."""

import collections
import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmc_jax.checkpoints.metadata import Metadata

# Blue and orange of Okabe and Ito's palette, which colour-blind readers can tell apart.
_MEASURED, _TARGET = "#0072B2", "#D55E00"
_QUIET = "#8A8A8A"
_COLOURS = (_MEASURED, _TARGET, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INCHES_PER_CELL = 0.62, 0.36


def curves(run: dict, metrics: list[dict], stages: list[Metadata]) -> Figure:
    """Loss, ratio, compression loss and learning rate over the steps of the whole run."""
    ends = _stage_ends(run, stages)
    names = ["loss", "distillation", "ratio", "compression_loss", "learning_rate"]
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
    _plot_validation(panels[0], metrics, stages, ends)
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
    figure.suptitle(run["name"], fontweight="bold", parse_math=False)
    return figure


_LABELS = {
    "loss": "loss (nats a token)",
    "distillation": "divergence\n(nats a token)",
    "ratio": "tokens per slot",
    "compression_loss": "compression\nloss",
    "learning_rate": "learning rate",
}


def _stage_ends(run: dict, stages: list[Metadata]) -> dict[str, int]:
    """Last step of every stage in the directory, counted over the run as metrics.jsonl does."""
    names = [metadata.stage for metadata in stages]
    ends = np.cumsum([run[name]["steps"] if name in run else 1 for name in names])
    return {name: int(end) for name, end in zip(names, ends, strict=True)}


def _plot(axes: Axes, metrics: list[dict], name: str, colour: str, label: str, **style) -> None:
    # JSON's null is a number that was not finite: a gap in the line.
    points = [(m["step"], np.nan if m[name] is None else m[name]) for m in metrics if name in m]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4, **style)


def _plot_validation(
    axes: Axes, metrics: list[dict], stages: list[Metadata], ends: dict[str, int]
) -> None:
    points = [(m["step"], m["validation_loss"]) for m in metrics if m.get("validation_loss")]
    points += [
        (ends[m.stage], m.validation["loss"])
        for m in stages
        if m.validation is not None and m.stage in ends
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


def heatmap(measured: dict, target: float, title: str) -> Figure:
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
    figure.suptitle(title, fontweight="bold", parse_math=False)
    axes.set_title(f"{measured['ratio']:.2f} tokens per slot", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=f"tokens per slot (white: target {target:g})")
    ticks = np.arange(np.ceil(max(low, 0.0)), np.floor(high) + 1)  # no ratio is below 1
    bar.ax.set_ylim(max(low, 0.0), high)
    bar.set_ticks(ticks, labels=[f"{2**t:g}" for t in ticks])
    bar.outline.set_visible(False)
    return figure


def _lines() -> Iterator[dict[str, str]]:
    """How lines look, each in a way of its own until colours and styles are used up."""
    for style, colour in itertools.cycle(itertools.product(("-", "--", ":"), _COLOURS)):
        yield {"linestyle": style, "color": colour}


def quality_by_bytes(rows: list[dict], by: str = "divergence") -> Figure:
    """Draw what compression costs over bytes of cache, a panel a length and a line a method.

    Args:
        rows: with "length", "method", "cache_bytes" and `by`; the method "dense" is a mark.
        by: "divergence", or "perplexity_percent", of models that were trained on.
    """
    lengths = sorted({row["length"] for row in rows})
    counts = collections.Counter(row["method"] for row in rows if row["method"] != "dense")
    methods = [method for method, _ in counts.most_common()]  # lines before single points
    names_take = 1.0 + 0.08 * max(map(len, methods), default=0)
    figure = Figure(figsize=(names_take + 4.2 * len(lengths), 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, length in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        here = [row for row in rows if row["length"] == length]
        for method, line in zip(methods, _lines(), strict=False):
            points = [(r["cache_bytes"] / 1e6, r[by]) for r in here if r["method"] == method]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o", label=method, **line)
        for row in here:
            if row["method"] == "dense":
                axes.plot(row["cache_bytes"] / 1e6, 0.0, "s", color=_QUIET, label="dense")
        axes.set(xlabel="cache at the end (MB)", title=f"{length:,} tokens")
        if by == "divergence":  # methods lie as far apart as 1 and 100, and the dense model at 0
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=0.0)
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    names = {
        "divergence": "divergence from dense (nats a token)",
        "perplexity_percent": "perplexity above dense (%)",
    }
    figure.axes[0].set_ylabel(names[by])
    shown = {}
    for axes in figure.axes:
        lines, names = axes.get_legend_handles_labels()
        shown |= dict(zip(names, lines, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False)
    return figure


def accuracy_by_ratio(rows: list[dict]) -> Figure:
    """Draw the share of right answers over tokens per slot, a panel a task and a line a method.

    Args:
        rows: with "task", "method", "ratio" and "accuracy"; the method "dense" is a dashed line.
    """
    tasks, methods = (list(dict.fromkeys(row[by] for row in rows)) for by in ("task", "method"))
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        here = [row for row in rows if row["task"] == task]
        lines = _lines()
        for method in methods:
            points = [(r["ratio"], 100 * r["accuracy"]) for r in here if r["method"] == method]
            if method == "dense":
                axes.axhline(points[0][1], color=_QUIET, linestyle="--", label=method)
            elif points:
                axes.plot(*zip(*sorted(points), strict=True), "o", label=method, **next(lines))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens per slot", title=task)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="right answers (%)", ylim=(0, 103))
    panels[-1].legend(frameon=False)
    return figure


def found_by_depth(rows: list[dict]) -> Figure:
    """Draw what was found as a map a method: depths downwards, lengths across.

    Args:
        rows: with "length", "method", which may come to one panel from several lengths, and
            "found", shares by depth; what is missing there stays white.
    """
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({depth for row in rows for depth in row["found"]}, key=float)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    across = min(4, len(methods))
    down = -(-len(methods) // across)
    longest = max(len(word) for method in methods for word in method.split())
    wide = max(0.7 + 0.5 * len(lengths), 0.4 + 0.065 * longest)  # inches, as of the titles' letters
    size = 1.1 + across * wide, 0.6 + down * (1.05 + 0.32 * len(depths))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axes, method in itertools.zip_longest(panels, methods):
        if method is None:
            axes.set_visible(False)
            continue
        shares = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            if row["method"] == method:
                for depth, share in row["found"].items():
                    shares[depths.index(depth), lengths.index(row["length"])] = share
        drawn = axes.imshow(shares, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{float(depth):g} %" for depth in depths])
        axes.set_title(method.replace(" ", "\n", 1), fontsize="small")
        axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=figure.axes, label="found", shrink=0.8)
    figure.supxlabel("tokens", fontsize="medium")
    figure.supylabel("depth", fontsize="medium")
    return figure
