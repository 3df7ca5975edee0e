"""A picture of what `bench` measured."""

from pathlib import Path

# Blue, orange and green of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {16: "#009E73", 64: "#0072B2", 256: "#D55E00"}
_STYLES = {"even": "o-", "uneven": "s--"}


def plot(report: dict, file: Path) -> None:
    """Useful bytes/s over those of copying, against live bytes, one panel for each contender.

    With H = 128 and G = 1, at which every size was measured. Nothing is done without matplotlib.

    Args:
        report: of `bench`, with `results` and `machine`.
        file: to write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    results = [
        one
        for one in report["results"]
        if one.get("of_copy") and (one["width"], one["queries"]) == (128, 1)
    ]
    names = list(dict.fromkeys(one["contender"] for one in results))
    if not names:
        return
    figure = Figure(figsize=(1 + 3 * len(names), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for page, colour in _COLOURS.items():
            for lengths, style in _STYLES.items():
                points = sorted(
                    (one["live_bytes"] / 1e6, one["of_copy"])
                    for one in results
                    if (one["contender"], one["page"], one["lengths"]) == (name, page, lengths)
                )
                if points:
                    label = f"page {page}, {lengths}"
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axes.set(xscale="log", xlabel="live MB", title=name)
        axes.set_ylim(bottom=0)
        axes.grid(color="#E6E6E6")
    panels[0].set_ylabel("of the rate of copying")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Decode attention, {report['machine']['device']}", fontweight="bold")
    figure.savefig(file)
