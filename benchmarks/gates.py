"""What methods cost a pretrained model that stays as it is, at equal numbers of slots.

    python -m benchmarks.gates --checkpoint=MODEL --data=DIR[,DIR] --gates=FILE [FILE ...]

Windows of held-out text, each alone in a cache, half of each text. Gates are measured at several
ratios. Files of one kind, which differ by their seeds, are summed up together. TOVA, H2O,
StreamingLLM and a fixed stride get the numbers of slots that the first file of each kind comes to:

    grows   a budget of t / ratio slots after t tokens, whose mean and end are those of the gates;
            a stride knows no other
    end     a fixed budget of as many as the gates hold at the window's end
    mean    a fixed one with which a row holds as many on average over the window

Differences from the dense model are paired by window; intervals are 1.96 standard errors over the
windows. A second run with the same output goes on where the first was; more gates may join it.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

from dmc_jax.checkpoints.gates import FILE, StoredGates, check_base, gates_for
from dmc_jax.checkpoints.models import open_model
from dmc_jax.commands import in_a_line
from dmc_jax.data.prepared import open_data
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.side_by_side import (
    OTHERS,
    interval,
    joined,
    measure,
    others_like,
    single_windows,
)
from dmc_jax.evaluation.tables import table
from dmc_jax.policies.dense import Dense


def name_of(gates: StoredGates) -> str:
    """Name a file of gates: a run's, which all have one name, by the run."""
    file = Path(gates.path).absolute()
    return file.parent.name if file.name == FILE else file.stem


def kind_of(gates: StoredGates) -> str:
    """Say what files have in common that differ by their seeds."""
    policy, tokens = gates.policy, gates.about.get("distilled_tokens", 0)
    margin = getattr(policy, "margin", None)
    also = "" if margin is None else f", margin {margin:g}"
    return f"{policy.name}, delay {policy.delay}{also}, {tokens:,} tokens"


def compare(model, files, some, options, record) -> None:
    """Adds what the record lacks of windows of one length, and writes it row by row."""
    count, length = some["tokens"].shape
    run = {"params": model.params, "config": model.config, "some": some, "batch": options.batch}
    dense = measure(**run, policy=Dense())
    record["dense_nats"][str(length)] = round(float(dense.nats.mean()), 4)

    def row_of(about: dict, policy) -> dict:
        about = {"length": length, "windows": count} | about
        there = next((row for row in record["rows"] if row.items() >= about.items()), None)
        if there is not None:
            return there
        measured = measure(**run, policy=policy, dense=dense)
        row = about | measured.figures(dense)
        print(json.dumps(row), flush=True)
        row["rises"] = [round(float(x), 5) for x in measured.rises(dense)]
        record["rows"].append(row)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        return row

    for ratio in options.ratios:
        seen = set()
        for gates in files:
            if not gates.table[0].ratio <= ratio <= gates.table[-1].ratio:
                continue
            name = name_of(gates)
            row = row_of({"method": name, "asked": ratio}, gates.at(ratio))
            others = () if kind_of(gates) in seen else options.others
            seen.add(kind_of(gates))
            for other in others:
                for budget, policy in others_like(other, row).items():
                    if budget in options.budgets:
                        about = {"method": other, "budget": budget, "like": ratio, "slots_of": name}
                        row_of(about, policy)


def summary(record: dict) -> str:
    """Lay a record out, a line a length, a ratio, a kind of gates and a budget.

    Perplexity against the dense model is the mean over files of one kind, which are taken for seeds
    and of which the least and the most stand in brackets. Beside it, how much higher that of other
    methods is than theirs, on the same windows. Intervals are over the windows.
    """
    kinds = {}
    for name, about in record["gates"].items():
        kinds.setdefault(about["kind"], []).append(name)
    gated, others = ([row for row in record["rows"] if by in row] for by in ("asked", "like"))
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
        spread = f" ({min(each):+.1f} to {max(each):+.1f})" if len(seeds) > 1 else ""
        at_end = np.mean([row["ratio_at_end"] for row in seeds])
        told = f"{length:,}", f"{windows}", f"{ratio:g}x", kind, f"{at_end:.2f}x"
        for budget in dict.fromkeys(row["budget"] for row in beside) or [""]:
            here = {row["method"]: row["rises"] for row in beside if row["budget"] == budget}
            more = (_percent(here[name] - rises) if name in here else "" for name in methods)
            lines.append((*told, _percent(rises) + spread, budget, *more))
    header = "tokens", "windows", "asked", "gates", "at the end", "perplexity", "slots", *methods
    return table(header, lines, left=("gates", "slots"))


def _percent(rises: np.ndarray) -> str:
    return f"{100 * math.expm1(rises.mean()):+.1f} ± {100 * interval(rises):.1f} %"


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes the JSON file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--gates", required=True, nargs="+")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--others", nargs="*", default=list(OTHERS), choices=list(OTHERS))
    parser.add_argument("--budgets", nargs="*", default=["grows", "end", "mean"])
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gates_cpu.json"))
    options = parser.parse_args(arguments)
    model = open_model(options.checkpoint)
    texts = [open_data(path) for path in options.data.split(",")]
    files = [gates_for(file, model.config) for file in options.gates]
    names = [name_of(gates) for gates in files]
    if len(set(names)) < len(names):
        parser.error(f"--gates: files of one name cannot be told apart, got {', '.join(names)}")
    for gates in files:
        check_base(gates, model.params, model.config)
    record = {
        "measures": "perplexity and divergence against the dense model, and slots a row",
        "machine": machine(" ".join(["python -m benchmarks.gates", *arguments])),
        "split": options.split,
        "text": [Path(data.manifest["source"]).name for data in texts],
        "gates": {name_of(gates): {"kind": kind_of(gates)} | gates.about for gates in files},
        "dense_nats": {},
        "rows": [],
    }
    if options.output.exists():
        there = json.loads(options.output.read_text())
        same = all(there.get(name) == record[name] for name in ("split", "text"))
        if not same or not record["gates"].items() >= there["gates"].items():
            parser.error(f"{options.output} is of other text or gates: name another --output")
        record |= {name: there[name] for name in ("dense_nats", "rows")}

    for length in options.lengths:
        share = -(-options.windows // len(texts))
        some = joined([single_windows(data, options.split, length, share) for data in texts])
        compare(model, files, some, options, record)
    print(f"\n{summary(record)}\n\nwrote {options.output}")


if __name__ == "__main__":
    in_a_line(main)
