"""What was measured, as text: Markdown tables, and a warning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmc_jax.config import ModelConfig
from dmc_jax.evaluation.perplexity import Evaluation

_COMPARED_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One model in a `comparison_table`."""

    name: str
    steps: int  # optimizer steps since the common starting point
    evaluation: Evaluation
    config: ModelConfig
    note: str = ""


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
    return table(header, lines, left=("model", "note"))


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
    return table(header, lines)


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


def missed_target(ratio: float, target: float) -> str | None:
    """Say that a model compresses less than it was trained to.

    Args:
        ratio: measured, in tokens per slot.
        target: wanted tokens per slot.

    Returns:
        A sentence if more than a twentieth of the target is missing, else None.
    """
    if ratio >= 0.95 * target:
        return None
    return (
        f"The target was missed: {ratio:.3f} tokens per slot where {target:.3f} were asked for "
        "(README, 'Settings beyond the paper', says what pulls towards it)."
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Lay out a Markdown table whose source is aligned too.

    Args:
        header: names of the columns.
        lines: their cells.
        left: names of the columns that hold text; the others hold numbers.
    """
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


def headline(about: dict[str, Any]) -> str:
    """Name a checkpoint and what its rows kept.

    Args:
        about: as `dmc_jax.evaluate --json` prints it.
    """
    held_to = about["policy"].keys() & {"budget", "ratio"}
    return (
        f"{about['checkpoint']} ({about['stage']}, step {about['step']}, "
        + (f"merging above {about['threshold']:.4g}" if about["mode"] == "dmc" else about["mode"])
        + "".join(f", {name} {about['policy'][name]:g}" for name in sorted(held_to))
        + ")"
    )


def evaluation_text(about: dict[str, Any]) -> str:
    """Lay out what was measured on held-out text, the dense model beside it if there is one.

    Args:
        about: as for `headline`.
    """
    ours, dense = about["evaluation"], about["dense"]
    other = about["kv_dtype"] != about["dtype"]
    columns = [("this model", ours)]
    if dense is not None:
        columns.append(("dense before", dense["evaluation"]))
    rows = [
        ("loss (nats a token)", "loss", ".4f"),
        ("perplexity", "perplexity", ".3f"),
        ("bits per byte", "bits_per_byte", ".4f"),
        ("tokens per slot", "ratio", ".2f"),
    ]
    lines = [
        headline(about),
        f"{about['data']}, {about['split']}: {ours['windows']:,} windows of {about['length']:,} "
        f"tokens, {ours['tokens']:,} predicted in {about['dtype']}"
        + (f", keys and values in {about['kv_dtype']}" if other else ""),
        "",
        f"{'':<20}" + "".join(f"{name:>14}" for name, _ in columns),
    ]
    lines += [
        f"{label:<20}" + "".join(f"{figures[key]:>14{form}}" for _, figures in columns)
        for label, key, form in rows
    ]
    if about["mode"] == "dmc":
        where = dense and f"dense before the retrofit: {dense['checkpoint']}"
        absent = "the dense model from before the retrofit is not there; name it with --dense=DIR"
        lines += ["", where or absent, "", "tokens per slot", "", head_table(ours)]
    return "\n".join(lines)
