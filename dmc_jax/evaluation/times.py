"""What a run's metrics say of its time, summed up."""

from dmc_jax.evaluation.tables import table

MARK = "seconds_"  # before the name of what time went into, in the lines of metrics.jsonl
PROGRESS = "step"  # the only part that is

PARTS = {
    "step": "taking steps",
    "data": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "validation",
    "compile": "compiling",
    "start": "checking and loading, before a stage's first step",
    "lost": "steps that had to be taken again",
}


def sum_up(lines: list[dict]) -> dict | None:
    """Add up the times of a run, up to its last log line.

    Args:
        lines: of metrics.jsonl.

    Returns:
        "seconds" by part, "goodput", the share of them that made progress, "tokens_per_second" and
        "mfu" while steps were taken, and how many were "skipped"; None where there are no times.
    """
    lines = [line for line in lines if f"{MARK}{PROGRESS}" in line]
    if not lines:
        return None
    seconds = {part: sum(line.get(MARK + part) or 0.0 for line in lines) for part in PARTS}
    trained = [line[f"{MARK}step"] + line[f"{MARK}data"] for line in lines]

    def mean(name: str) -> float | None:
        known = [
            (line[name], time) for line, time in zip(lines, trained, strict=True) if line.get(name)
        ]
        weights = sum(time for _, time in known)
        return sum(x * time for x, time in known) / weights if weights else None

    return {
        "seconds": seconds,
        "goodput": seconds[PROGRESS] / max(sum(seconds.values()), 1e-9),
        "tokens_per_second": mean("tokens_per_second"),
        "mfu": mean("mfu"),
        # Counted from 0 in every stage.
        "skipped": sum(
            max(0, now.get("skipped", 0) - before.get("skipped", 0))
            for before, now in zip([{}, *lines], lines, strict=False)
        ),
    }


def section(summed: dict) -> list[str]:
    """Paragraphs of Markdown about what `sum_up` gave."""
    total = max(sum(summed["seconds"].values()), 1e-9)
    rows = [
        (PARTS[part], f"{seconds:,.1f}", f"{100 * seconds / total:.1f} %")
        for part, seconds in summed["seconds"].items()
    ]
    told = [f"goodput {100 * summed['goodput']:.1f} %"]
    if summed["tokens_per_second"]:
        told.append(f"{summed['tokens_per_second']:,.0f} tokens a second while steps were taken")
    if summed["mfu"]:
        told.append(f"MFU {100 * summed['mfu']:.1f} %")
    if summed["skipped"]:
        told.append(f"{summed['skipped']} skipped steps")
    return [
        "## Time",
        f"Up to the last log line: {', '.join(told)}.",
        table(("what", "seconds", "share"), rows, left=("what",)),
    ]
