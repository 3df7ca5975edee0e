"""What methods cost a pretrained model that stays as it is, at equal numbers of slots.

    python -m benchmarks.gates --checkpoint=MODEL --data=DIR[,DIR] --gates=FILE [FILE ...]

Windows of held-out text, each alone in a cache, half of each text. Gates are measured at several
ratios; TOVA, H2O and StreamingLLM get the numbers of slots that the first file's gates come to:

    grows   a budget of t / ratio slots after t tokens, whose mean and end are those of the gates
    end     a fixed budget of as many as the gates hold at the window's end
    mean    a fixed one with which a row holds as many on average over the window

Differences from the dense model are paired by window; intervals are 1.96 standard errors over the
windows. A second run with the same output goes on where the first was.
"""

import argparse
import json
import sys
from pathlib import Path

from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import open_model
from dmc_jax.data.prepared import open_data
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.side_by_side import budget_of_mean, joined, measure, single_windows
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.h2o import H2O
from dmc_jax.policies.tova import TOVA
from dmc_jax.policies.window import Window

OTHERS = {"TOVA": TOVA, "H2O": H2O, "StreamingLLM": Window}


def budgets_like(row: dict) -> dict:
    """Arguments of a budgeted policy that come to the slots of a measured row, by their name."""
    budgets = {
        "grows": {"budget": 16, "ratio": row["ratio_at_end"]},
        "end": {"budget": round(row["end_slots"])},
    }
    if "mean_slots" in row:
        budgets["mean"] = {"budget": budget_of_mean(row["mean_slots"], row["length"])}
    return budgets


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
        row = about | measure(**run, policy=policy).figures(dense)
        print(json.dumps(row), flush=True)
        record["rows"].append(row)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        return row

    for ratio in options.ratios:
        rows = [
            row_of({"method": Path(gates.path).name, "asked": ratio}, gates.at(ratio))
            for gates in files
            if gates.table[0].ratio <= ratio <= gates.table[-1].ratio
        ]
        for name in options.others if rows else ():
            for kind, budget in budgets_like(rows[0]).items():
                if kind in options.budgets:
                    about = {"method": name, "budget": kind, "like": ratio}
                    row_of(about, OTHERS[name](**budget))


def main() -> None:
    """Measures, prints and writes the JSON file."""
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
    options = parser.parse_args()
    model = open_model(options.checkpoint)
    texts = [open_data(path) for path in options.data.split(",")]
    files = [gates_for(file, model.config) for file in options.gates]
    for gates in files:
        check_base(gates, model.params, model.config)
    record = {
        "measures": "perplexity and divergence against the dense model, and slots a row",
        "machine": machine(" ".join(["python -m benchmarks.gates", *sys.argv[1:]])),
        "split": options.split,
        "text": [Path(data.manifest["source"]).name for data in texts],
        "gates": {Path(gates.path).name: gates.about for gates in files},
        "dense_nats": {},
        "rows": [],
    }
    if options.output.exists():
        there = json.loads(options.output.read_text())
        if {n: there.get(n) for n in ("split", "text", "gates")} == {
            n: record[n] for n in ("split", "text", "gates")
        }:
            record |= {name: there[name] for name in ("dense_nats", "rows")}

    for length in options.lengths:
        share = -(-options.windows // len(texts))
        some = joined([single_windows(data, options.split, length, share) for data in texts])
        compare(model, files, some, options, record)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
