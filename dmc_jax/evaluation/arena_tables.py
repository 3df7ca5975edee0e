"""What an arena recorded, as tables and as a picture."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from dmc_jax.evaluation.needle import NEEDLES
from dmc_jax.evaluation.record import Record, Row
from dmc_jax.evaluation.side_by_side import interval
from dmc_jax.evaluation.tables import table


def report(record: Record) -> str:
    """Lay a record out in Markdown, a section a contest."""
    kinds = {}
    for name, about in record.about["gates"].items():
        kinds.setdefault(about["kind"], []).append(name)
    sections = []
    for contest in dict.fromkeys(row["contest"] for row in record.rows):
        rows = [row for row in record.rows if row["contest"] == contest]
        if contest == "text":
            beside = [text_table(rows, kinds)] if kinds else []
            tables = [bytes_table(rows), *beside, position_table(rows)]
        elif contest in NEEDLES:
            tables = [needles_table(rows)]
        else:
            tables = [{"humaneval": functions_table, "serving": serving_table}[contest](rows)]
        sections.append(f"## {contest}\n\n" + "\n\n".join(tables))
    return "\n\n".join(sections) + "\n"


def points(record: Record) -> list[Row]:
    """Rows of text for `plots.quality_by_bytes`, with the bytes at the peak.

    A method whose slots grow and one with a fixed number are lines of their own. Gates of one kind,
    which differ by their seeds, are a point: their mean.
    """
    rows = [row for row in record.rows if row["contest"] == "text"]
    kinds = {name: about["kind"] for name, about in record.about["gates"].items()}
    grouped = {}
    for row in rows:
        if row.get("budget") != "mean":
            kind = kinds.get(row["method"], row["method"])
            by = "kv_dtype", "length", "asked", "like", "budget", "slots_of"
            grouped.setdefault((kind, *map(row.get, by)), []).append(row)
    return [
        {
            "method": _named(same[0])[0] + ", fixed" * (same[0].get("budget") == "end"),
            "length": same[0]["length"],
            "cache_bytes": np.mean([row["peak_bytes"] for row in same]),
            "divergence": np.mean([row["divergence"] for row in same]),
        }
        for same in grouped.values()
    ]


def maps(record: Record, contest: str) -> list[Row]:
    """Rows of a needle for `plots.found_by_depth`, a panel a method, budget and ratio."""
    rows = [row for row in record.rows if row["contest"] == contest]

    def named(row):
        ratio = row.get("asked", row.get("like"))
        parts = _named(row)[0], row.get("budget"), ratio and f"{ratio:g}x"
        return " ".join(part for part in parts if part)

    return [row | {"method": named(row)} for row in rows]


def bytes_table(rows: Sequence[Row]) -> str:
    """Quality on text against the dense model, beside bytes of cache on average and at the peak."""
    lines = [
        (
            f"{row['length']:,}",
            *_named(row),
            *(f"{row[name] / 1e6:.2f} MB" for name in ("mean_bytes", "peak_bytes")),
            f"{row['divergence']:.4f}",
            _percent(np.asarray(row["rises"])),
        )
        for row in rows
    ]
    header = "cache on average", "at its peak", "divergence (nats)", "perplexity"
    return table(("tokens", *_NAMED, *header), lines, left=("method", "slots"))


def text_table(rows: Sequence[Row], kinds: dict[str, list[str]]) -> str:
    """Perplexity on text, a line a length, a ratio, a kind of gates and a budget.

    Perplexity against the dense model is the mean over gates of one kind, which are taken for seeds
    and of which the least and the most are told. Beside it, how much higher that of other
    methods is than theirs, on the same windows. Intervals are over the windows.

    Args:
        rows: of the contest.
        kinds: names of gates that differ by their seeds, by what they have in common.
    """
    plain = [row for row in rows if not _of_int8(row)]
    gated, others = ([row for row in plain if by in row] for by in ("asked", "like"))
    methods = list(dict.fromkeys(row["method"] for row in others))
    cases = sorted({(row["length"], row["windows"], row["asked"]) for row in gated})
    lines = []
    for (length, windows, ratio), (kind, names) in itertools.product(cases, kinds.items()):
        case = {"length": length, "windows": windows}
        asked, like = (case | {by: ratio} for by in ("asked", "like"))
        seeds = [r for r in gated if r["method"] in names and r.items() >= asked.items()]
        beside = [r for r in others if r["slots_of"] in names and r.items() >= like.items()]
        if not seeds:
            continue
        rises = np.mean([row["rises"] for row in seeds], axis=0)
        each = [row["perplexity_percent"] for row in seeds]
        spread = f", seeds {min(each):+.1f} to {max(each):+.1f}" if len(seeds) > 1 else ""
        at_end = np.mean([row["ratio_at_end"] for row in seeds])
        of_means = np.mean([row["ratio_of_means"] for row in seeds])
        told = f"{length:,}", f"{windows}", f"{ratio:g}x", kind
        told += f"{at_end:.2f}x", f"{of_means:.2f}x", _percent(rises) + spread
        for budget in dict.fromkeys(row["budget"] for row in beside) or [""]:
            here = {row["method"]: row["rises"] for row in beside if row["budget"] == budget}
            more = (_percent(here[name] - rises) if name in here else "" for name in methods)
            lines.append((*told, budget, *more))
    header = "tokens", "windows", "asked", "gates", "at the end", "of means", "perplexity"
    return table((*header, "slots", *methods), lines, left=("gates", "slots"))


def position_table(rows: Sequence[Row]) -> str:
    """Perplexity against the dense model by where in a window a token stands."""
    places = list(dict.fromkeys(place for row in rows for place in row["percent_by_position"]))
    lines = []
    for row in rows:
        if row["method"] != "dense" or _of_int8(row):
            by_place = row["percent_by_position"]
            each = (f"{by_place[place]:+.1f} %" if place in by_place else "" for place in places)
            lines.append((f"{row['length']:,}", *_named(row), *each))
    return table(("tokens", *_NAMED, *places), lines, left=("method", "slots"))


def needles_table(rows: Sequence[Row]) -> str:
    """The share of key words found at every depth; empty where the dense model finds none."""
    depths = list(dict.fromkeys(depth for row in rows for depth in row["found"]))
    lines = [
        (
            f"{row['length']:,}",
            *_named(row),
            *(f"{row['found'][depth]:.2f}" if depth in row["found"] else "" for depth in depths),
        )
        for row in rows
    ]
    header = "tokens", *_NAMED, *(f"depth {depth} %" for depth in depths)
    return table(header, lines, left=("method", "slots"))


def functions_table(rows: Sequence[Row]) -> str:
    """Functions that pass their tests, how much is written, and how likely known solutions are."""
    lines = [
        (
            *_named(row),
            f"{100 * row['pass_at_1']:.1f} %" if "pass_at_1" in row else "",
            f"{row['mean_new_tokens']:.0f}",
            f"{row['cut_short']}",
            f"{row['solution_nats']:.3f}",
        )
        for row in rows
    ]
    header = "pass@1", "tokens written", "cut short", "nats a token of solutions"
    return table((*_NAMED, *header), lines, left=("method", "slots"))


def serving_table(rows: Sequence[Row]) -> str:
    """Tokens a second and sequences held."""
    lines = [
        (*_named(row), f"{row['sequences']:.1f}", f"{row['tokens_per_second']:.1f}") for row in rows
    ]
    return table((*_NAMED, "sequences held", "tokens/s"), lines, left=("method", "slots"))


_NAMED = "method", "slots", "tokens per slot"


def _of_int8(row: Row) -> bool:
    return row.get("kv_dtype") == "int8"


def _named(row: Row) -> tuple[str, str, str]:
    name = row["method"] + (", int8 pages" if _of_int8(row) else "")
    return name, row.get("budget", ""), f"{row['ratio_at_end']:.2f}x"


def _percent(rises: np.ndarray) -> str:
    mean, *ends = (100 * math.expm1(x) for x in (rises.mean(), *interval(rises)))
    return f"{mean:+.1f} % ({ends[0]:.1f} to {ends[1]:.1f})"
