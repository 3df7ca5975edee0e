# %% [markdown]
# # Ablations: merge or drop, at once or later, learn from the model or from the text
#
# A Llama of a million parameters is trained on the source of Python's library, and stays as it is.
# Gates are made for it in eight ways: they merge tokens or drop them, at once or after a delay, and
# learn from the dense model (distillation) or from the next token. Then the delay alone, and what a
# threshold is worth that no step has seen. Half an hour on two CPU cores; `--preset=gpu` trains
# longer.
#
#     python experiments/ablations.py
#
# A run that was stopped goes on where it was. Output: `results/ablations/`.

# %%
# A script uses the package that it lies beside. A notebook installs it where it is missing: from
# the folder above or, in Colab say, from "git+" and the address of the repository.
import importlib.util
import subprocess
import sys
from pathlib import Path

source = ".."  # @param {type: "string"}
if "__file__" in globals():
    sys.path.insert(0, str(Path(__file__).parents[1]))
elif importlib.util.find_spec("dmc_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
import argparse
import dataclasses
import itertools
import re

from absl import logging

import dmc_jax as dmc
from dmc_jax.checkpoints.gates import load_gates
from dmc_jax.config import GatesConfig
from dmc_jax.data.prepare import prepare
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.record import open_record
from dmc_jax.evaluation.side_by_side import measure, single_windows, slot_bytes
from dmc_jax.evaluation.tables import table
from dmc_jax.policies.dense import Dense

logging.set_verbosity(logging.INFO)

PRESETS = {"cpu": {"steps": 200, "batch": 8}, "gpu": {"steps": 2_000, "batch": 32}}
RATIOS = 1.5, 2.0, 3.0, 4.0
WINDOWS = 64  # of the test files
DELAY = 16  # tokens
DELAYS = 1, 4, 64  # beside it
DOES = {
    "merge": {"method": "dmc"},
    "drop": {"method": "dms"},
    "merge, and drop what is 2 above": {"method": "dmc", "margin": 2.0},
}
LEARNS = {
    "distillation": {"distillation": 1.0, "next_token": 0.0},
    "next token": {"distillation": 0.0, "next_token": 1.0},
}

parser = argparse.ArgumentParser()
parser.add_argument("--preset", choices=PRESETS, default="cpu")
parser.add_argument("--output", type=Path, default=Path("results/ablations"))
options = parser.parse_args([] if "__file__" not in globals() else None)
sizes = PRESETS[options.preset]
folder = options.output

# %% [markdown]
# ## The model

# %%
tiny = dmc.RunConfig.named("tiny_4x")
data = prepare(tiny.data.path)
tiny = dataclasses.replace(tiny, output=str(folder / "runs"), name="model", stages="pretrain")
base = dmc.load(dmc.train(tiny))
windows = single_windows(data, "test", tiny.data.length, WINDOWS)
dense = measure(base.params, base.config, windows, Dense(), batch=16)

# %% [markdown]
# ## Gates, each measured at every ratio
#
# Nothing is dropped at once: the token itself is read with all that came before, so that a delay of
# 1 is the least that there is. Perplexity is against the dense model on the same windows.

# %%
about = {"machine": machine("python experiments/ablations.py"), "preset": options.preset}
record = open_record(folder / "table.json", about, same=("preset",))
gating = dmc.RunConfig.named(f"gates:{base.path}")
gating = dataclasses.replace(
    gating,
    output=tiny.output,
    distill=dataclasses.replace(gating.distill, steps=sizes["steps"], learning_rate=3e-3),
    data=dataclasses.replace(tiny.data, batch=sizes["batch"]),
    eval_windows=32,
)


def ask(does: str, delay: int, learns: str, trained: tuple[float, ...] = RATIOS) -> None:
    """Make gates and measure them: a row for every ratio."""
    name = f"{does} after {delay}, {learns}, {' '.join(f'{x:g}' for x in trained)}"
    made = dataclasses.replace(
        gating,
        name=re.sub(r"\W+", "_", name),
        gates=GatesConfig(delay=delay, windows=128, ratios=trained, **DOES[does], **LEARNS[learns]),
    )
    gates = load_gates(dmc.train(made) / "gates.safetensors", base.config)
    for ratio in RATIOS:
        keys = {"does": does, "delay": delay, "learns": learns, "trained": list(trained)}

        def figures(ratio=ratio):
            run = base.params, base.config, windows, gates.at(ratio)
            return measure(*run, batch=16, dense=dense).figures(dense)

        if gates.table[0].ratio <= ratio <= gates.table[-1].ratio:
            record.row(keys | {"asked": ratio}, figures)


for does, learns in itertools.product(("merge", "drop"), LEARNS):
    for delay in (0 if does == "merge" else 1, DELAY):
        ask(does, delay, learns)
ask("merge, and drop what is 2 above", DELAY, "distillation")
for does, delay in itertools.product(("merge", "drop"), DELAYS):
    ask(does, delay, "distillation")
for does in ("merge", "drop"):
    ask(does, DELAY, "distillation", (2.0,))

# %% [markdown]
# ## The table, and a picture of the eight


# %%
cases, points = {}, []
for row in record.rows:
    trained = ", ".join(f"{each:g}x" for each in row["trained"])
    low, high = row["perplexity_percent_interval"]
    percent = f"{row['perplexity_percent']:+.1f} % ({low:.1f} to {high:.1f})"
    told = f"{row['ratio_at_end']:.2f}: {percent}"
    named = f"{row['does']} after {row['delay']}, {row['learns']}"
    cases.setdefault((named, trained), {})[row["asked"]] = told
    if row["delay"] in (0, 1, DELAY) and row["trained"] == list(RATIOS):
        size = {
            "length": tiny.data.length,
            "cache_bytes": row["end_slots"] * slot_bytes(base.config),
        }
        points.append(row | size | {"method": named})
lines = [(*case, *(each.get(ratio, "") for ratio in RATIOS)) for case, each in cases.items()]
header = "gates", "trained at", *(f"asked {ratio:g}x" for ratio in RATIOS)
text = table(header, lines, left=("gates", "trained at"))
(folder / "table.md").write_text(text + "\n")
quality_by_bytes(points).savefig(folder / "quality.png")
print(f"\n{text}\n\nwrote {folder}")
