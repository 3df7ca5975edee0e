"""What gates cost a pretrained model, beside TOVA with as many slots on average.

    python -m benchmarks.gates --checkpoint=MODEL --data=DIR --gates=FILE

Windows of validation text that lie in one document, each as one sequence. Of each method: nats a
token and the divergence from the dense model's predictions; slots a row holds while it reads, on
average over the window (a dense one: half the window) and at its end. TOVA gets the budget with
which it holds, on average, what the gates hold. Differences from the dense model are paired by
window; the interval is 1.96 standard errors over the windows.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import open_model
from dmc_jax.core.losses import token_losses
from dmc_jax.data.loader import windows
from dmc_jax.data.prepared import open_data
from dmc_jax.evaluation.machine import machine
from dmc_jax.model.llama import Llama
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import attend_whole
from dmc_jax.policies.tova import TOVA

_READ = ("tokens", "targets", "positions")


@functools.partial(jax.jit, static_argnames="config")
def measure(params, config, window, policy) -> tuple:
    """Nats and divergence of every token, and slots of every row after it, summed over rows."""

    def run(policy):
        attend = attend_whole(policy, config, window["positions"])
        return Llama(config).apply({"params": params}, window["tokens"], attend=attend)

    output, dense = run(policy), run(Dense())
    nats, apart = token_losses(output.prediction, window["targets"], dense.prediction)
    slots = sum(record.appends.sum(axis=(0, 3)) for record in output.records)  # [B, T]
    return nats[0], apart[0], jnp.cumsum(slots[0])


def budget_for(slots: float, length: int) -> int:
    """The number of slots at which a row that fills up, and stays full, holds `slots` on average.

    The mean of min(t, b) over t = 1 .. T is b - b (b - 1) / 2T.
    """
    half = length + 0.5
    return max(1, round(half - math.sqrt(max(half**2 - 2 * length * slots, 0.0))))


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--gates", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gates_cpu.json"))
    options = parser.parse_args()
    model, data = open_model(options.checkpoint), open_data(options.data)
    params, config, T = model.params, model.config, options.length
    found = windows(data, options.split, T)
    whole = [w for w in map(found.__getitem__, range(len(found))) if w["segment_ids"].max() == 1]
    at = np.unique(np.linspace(0, len(whole) - 1, min(options.windows, len(whole))).astype(int))
    some = [{name: jnp.asarray(whole[i][name])[None] for name in _READ} for i in at]

    def of(policy) -> dict:
        got = [jax.device_get(measure(params, config, window, policy)) for window in some]
        nats, apart, slots = (np.stack(x) for x in zip(*got, strict=True))
        slots = slots / config.kv_rows
        return {"nats": nats.mean(axis=1), "apart": apart.mean(axis=1), "slots": slots}

    dense = of(Dense())
    rows = []

    def report(method: str, policy, **more) -> dict:
        got = of(policy)
        rise = got["nats"] - dense["nats"]
        row = {"method": method, **more}
        row |= {
            "mean_slots": float(got["slots"].mean()),
            "end_slots": float(got["slots"][:, -1].mean()),
        }
        row |= {
            "ratio_of_means": (T + 1) / 2 / row["mean_slots"],
            "ratio_at_end": T / row["end_slots"],
        }
        error = 1.96 / math.sqrt(len(rise))
        row |= {
            "perplexity_percent": 100 * math.expm1(rise.mean()),
            "perplexity_percent_interval": 100 * error * float(rise.std(ddof=1)),
            "divergence": float(got["apart"].mean()),
            "divergence_interval": error * float(got["apart"].std(ddof=1)),
        }
        row = {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
        return row

    stored = gates_for(options.gates, config)
    check_base(stored, params, config)
    for ratio in options.ratios:
        row = report("gates, delayed eviction", stored.at(ratio), asked=ratio)
        budget = budget_for(row["mean_slots"], T)
        report("TOVA", TOVA(budget), budget=budget)
    about = {
        "measures": "perplexity and divergence against the dense model, and slots a row",
        "machine": machine(" ".join(["python -m benchmarks.gates", *sys.argv[1:]])),
        "windows": len(some),
        "length": T,
        "dense_nats": round(float(dense["nats"].mean()), 4),
        "gates": stored.about,
        "table": [dataclasses.asdict(entry) for entry in stored.table],
    }
    options.output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
