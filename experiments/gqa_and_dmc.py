# %% [markdown]
# # Fewer KV heads, fewer tokens, or both
#
# A Llama of a million parameters is trained on the source of Python's library. From it come models
# with a cache a quarter and an eighth the size: with KV heads averaged (grouped-query attention),
# by DMC, and by both at once. All train on for as many steps, and all learn from the pretrained
# model. About an hour on two CPU cores.
#
#     python experiments/gqa_and_dmc.py
#
# A run that was stopped goes on where it was. Output: `results/gqa_and_dmc/`.

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
import os

from absl import logging

import dmc_jax as dmc
from dmc_jax.data.prepare import prepare
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.record import open_record
from dmc_jax.evaluation.side_by_side import measure, single_windows, slot_bytes
from dmc_jax.evaluation.tables import table
from dmc_jax.policies.dense import Dense

logging.set_verbosity(logging.INFO)

CASES = [  # KV heads of four, and tokens per slot
    (4, 1.0),
    (1, 1.0),
    (2, 2.0),
    (4, 4.0),
    (1, 2.0),
    (2, 4.0),
    (4, 8.0),
]
WINDOWS = 128  # of the test files

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, help="of each stage of training on; default: the config's")
parser.add_argument("--output", type=Path, default=Path("results/gqa_and_dmc"))
options = parser.parse_args([] if "__file__" not in globals() else None)
folder = options.output

# %% [markdown]
# ## The pretrained model, and those with fewer KV heads

# %%
tiny = dmc.RunConfig.named("tiny_4x")
if options.steps:
    stages = "pretrain", "zero_out", "retrofit", "finetune"
    fewer = {s: dataclasses.replace(getattr(tiny, s), steps=options.steps) for s in stages}
    tiny = dataclasses.replace(tiny, **fewer)
data = prepare(tiny.data.path)
tiny = dataclasses.replace(tiny, output=str(folder / "runs"))
base = dmc.load(dmc.train(dataclasses.replace(tiny, name="model", stages="pretrain")))


def with_kv_heads(kv_heads: int) -> Path:
    """The pretrained model with its KV heads averaged into fewer."""
    made = folder / f"kv_heads_{kv_heads}"
    if kv_heads == base.config.kv_heads:
        return base.path
    if not made.exists():
        flags = f"--input={base.path}", f"--output={made}", f"--kv_heads={kv_heads}"
        command = [sys.executable, "-m", "dmc_jax.convert", *flags, "--to=dmc_jax"]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, env=found, check=True)
    return made


# %% [markdown]
# ## All train on for as many steps
#
# Without DMC these are of one stage, at the rate and with the decay of the last one of DMC.

# %%
further = tiny.zero_out.steps + tiny.retrofit.steps + tiny.finetune.steps
once = dataclasses.replace(tiny.finetune, steps=further, warmup=20)


def trained(kv_heads: int, ratio: float):
    """The model of a case."""
    start, asked = with_kv_heads(kv_heads), tiny.compression
    if ratio > 1:
        asked = dataclasses.replace(asked, ratio=ratio)
    run = dataclasses.replace(
        tiny,
        name=f"kv_heads_{kv_heads}_ratio_{ratio:g}",
        model=dmc.load(start).config,
        init_from=str(start),
        stages="pretrain" if ratio == 1 else "zero_out,retrofit,finetune",
        pretrain=once,
        compression=dataclasses.replace(asked, teacher=str(base.path)),
    )
    return dmc.load(dmc.train(run))


# %% [markdown]
# ## The table, against the pretrained model, and a picture

# %%
about = {"machine": machine("python experiments/gqa_and_dmc.py"), "steps": further}
record = open_record(folder / "table.json", about, same=("steps",))
windows = single_windows(data, "test", tiny.data.length, WINDOWS)
dense = measure(base.params, base.config, windows, Dense(), batch=16)
for kv_heads, ratio in CASES:

    def figures(kv_heads=kv_heads, ratio=ratio):
        model = trained(kv_heads, ratio)
        run = model.params, model.config, windows, model.policy
        found = measure(*run, batch=16).figures(dense)
        for name in ("divergence", "divergence_interval"):  # from what itself is without DMC
            del found[name]
        return found | {"cache_bytes": round(found["end_slots"] * slot_bytes(model.config))}

    record.row({"kv_heads": kv_heads, "asked": ratio}, figures)
whole = round(tiny.data.length * slot_bytes(base.config))
lines, points = [], []
for row in record.rows:
    low, high = row["perplexity_percent_interval"]
    lines.append(
        (
            f"{row['kv_heads']}",
            f"{row['ratio_at_end']:.2f}x",
            f"{whole / row['cache_bytes']:.2f}x",
            f"{row['perplexity_percent']:+.1f} % ({low:.1f} to {high:.1f})",
        )
    )
    kinds = {
        (False, False): "neither",
        (False, True): "fewer KV heads",
        (True, False): "DMC",
        (True, True): "both",
    }
    kind = kinds[row["asked"] > 1, row["kv_heads"] < base.config.kv_heads]
    points.append(row | {"length": tiny.data.length, "method": kind})
header = "KV heads", "tokens per slot", "smaller cache", "perplexity"
text = table(header, lines)
(folder / "table.md").write_text(text + "\n")
quality_by_bytes(points, "perplexity_percent").savefig(folder / "quality.png")
print(f"\n{text}\n\nwrote {folder}")
