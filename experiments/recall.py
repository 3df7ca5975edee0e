# %% [markdown]
# # Recall: what a smaller cache forgets
#
# A small model learns three tasks that need memory, from nothing: many keys and their values among
# filler, one pass key, chains of assignments. In the steps that it takes so far it finds pass keys,
# and few of the rest, which the end says: that tells little of caches. Its cache is compressed,
# by what needs no training (TOVA, H2O, StreamingLLM), by gates that drop or merge tokens after a
# delay, made for the model as it is, and by DMC, for which the model is trained; and every method
# is asked at ratios up to 16. Over half an hour on two CPU cores; `--preset=gpu` is larger.
#
#     python experiments/recall.py
#
# A run that was stopped goes on where it was. Output: `results/recall/`.

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
import json

from absl import logging

import dmc_jax as dmc
from dmc_jax.checkpoints.gates import load_gates
from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    GatesConfig,
    ModelConfig,
    StageConfig,
)
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.needle import SOLVED
from dmc_jax.evaluation.perplexity import calibrate_threshold
from dmc_jax.evaluation.plots import accuracy_by_ratio
from dmc_jax.evaluation.recall import TASKS, accuracy, document, word_tokenizer
from dmc_jax.evaluation.record import open_record
from dmc_jax.evaluation.side_by_side import OTHERS, others_like
from dmc_jax.evaluation.tables import table
from dmc_jax.policies.dense import Dense

logging.set_verbosity(logging.INFO)

# %% [markdown]
# ## Sizes

# %%
PRESETS = {
    "cpu": {"words": 191, "documents": 30_000, "steps": 2_000, "batch": 32, "gates": 300},
    "gpu": {"words": 511, "documents": 100_000, "steps": 6_000, "batch": 128, "gates": 1_000},
}
RATIOS = 2.0, 4.0, 8.0, 16.0
TESTED = 128  # documents a task

parser = argparse.ArgumentParser()
parser.add_argument("--preset", choices=PRESETS, default="cpu")
parser.add_argument("--output", type=Path, default=Path("results/recall"))
options = parser.parse_args([] if "__file__" not in globals() else None)
sizes = PRESETS[options.preset]
folder = options.output
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Documents
# Lines of words; a word is a token. Seeds from a million on are for the test.

# %%
tokenizer_file = folder / "tokenizer.json"
if not tokenizer_file.exists():
    word_tokenizer().save(str(tokenizer_file))
    with (folder / "documents.jsonl").open("w") as file:
        for seed in range(sizes["documents"]):
            words, _ = document(list(TASKS)[seed % len(TASKS)], seed, sizes["words"])
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
data = prepare(folder / "data", source=folder / "documents.jsonl", tokenizer=tokenizer_file)
tokenizer = load_tokenizer(data.tokenizer_path)
length = sizes["words"] + 2  # of a window: a document between the marks of its ends

# %% [markdown]
# ## The model

# %%
run = dmc.RunConfig(
    name="pretrained",
    output=str(folder / "runs"),
    model=ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_width=384,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=2 * sizes["words"],
        tied_embeddings=True,
    ),
    stages="pretrain",
    pretrain=StageConfig(
        steps=sizes["steps"],
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        shape="cosine",
        warmup=100,
    ),
    data=DataConfig(path=str(data.path), length=length, batch=sizes["batch"]),
    initializer_range=128**-0.5,  # or attention stays where it is for long
    compute_dtype="float32",
    remat="none",
    attention_block=length,
    log_every=100,
    save_every=500,
    eval_windows=64,
)
base = dmc.load(dmc.train(run))

# %% [markdown]
# ## Gates that drop, gates that merge, and DMC
#
# Gates take the model as it is. DMC trains it: the paper's recipe in small, for four tokens a slot;
# its threshold then moves over the other ratios.

# %%
gating = dmc.RunConfig.named(f"gates:{base.path}")
gated = {}
for method in ("dms", "dmc"):
    rate = 3e-3 if method == "dmc" else 1e-3
    made = dataclasses.replace(
        gating,
        name=f"gates_{method}",
        output=run.output,
        gates=GatesConfig(method=method, delay=8, windows=256, ratios=(1.5, 2.0, 4.0, 8.0, 16.0)),
        distill=dataclasses.replace(gating.distill, steps=sizes["gates"], learning_rate=rate),
        data=run.data,
        eval_windows=run.eval_windows,
    )
    gated[f"gates, {method}"] = load_gates(dmc.train(made) / "gates.safetensors", base.config)

retrofit = dataclasses.replace(
    run,
    init_from=str(base.path),
    name="dmc",
    stages="zero_out,retrofit,finetune",
    dmc=DMCSettings(window=12, temperature=0.15, offset=2.0, eps=2**-7),
    compression=CompressionConfig(
        ratio=4.0,
        weight=2.0,
        per_layer=True,
        decision_multiplier=6.0,
        distillation=1.0,
        calibration_windows=64,
    ),
    zero_out=StageConfig(steps=20, learning_rate=1e-3, warmup=20),
    retrofit=StageConfig(steps=sizes["gates"], learning_rate=1e-3),
    finetune=StageConfig(
        steps=sizes["gates"], learning_rate=1e-3, final_learning_rate=1e-4, shape="cosine"
    ),
)
merging = dmc.load(dmc.train(retrofit))

# %% [markdown]
# ## Every method at every ratio
#
# An answer counts if it is the likeliest token, after the right answers before it. Budgets grow
# with the text, as many slots after every token as tokens over the ratio; gates are set for it by
# their tables, DMC's threshold by training documents.

# %%
about = {"machine": machine("python experiments/recall.py"), "preset": options.preset}
record = open_record(folder / "table.json", about, same=("preset",))
tested = range(10**6, 10**6 + TESTED)


def ask(name: str, model, policy, ratio: float) -> None:
    """A row a task: the share of right answers, and tokens per slot at the end."""
    for task in TASKS:

        def figures(task=task):
            asked = base.params if model is None else model.params, base.config, tokenizer, task
            right, measured = accuracy(*asked, policy, seeds=tested, length=sizes["words"])
            return {"accuracy": round(right, 4), "ratio": round(measured, 3)}

        record.row({"task": task, "method": name, "asked": ratio}, figures)


def calibrated(ratio: float):
    """DMC with the threshold for a ratio."""
    sizes_of = {"windows": 64, "length": run.data.length, "batch": 32}
    found = calibrate_threshold(
        merging.params, merging.config, data, policy=merging.policy, ratio=ratio, **sizes_of
    )
    return dataclasses.replace(merging.policy, threshold=found)


ask("dense", None, Dense(), 1.0)
for ratio in RATIOS:
    for name, gates in gated.items():
        if gates.table[0].ratio <= ratio <= gates.table[-1].ratio:
            ask(name, None, gates.at(ratio), ratio)
    ask("DMC, trained at 4x", merging, calibrated(ratio), ratio)
    for name in OTHERS:
        ask(name, None, others_like(name, {"ratio_at_end": ratio})["grows"], ratio)

# %% [markdown]
# ## Table and picture

# %%
solved = {row["task"]: row["accuracy"] for row in record.rows if row["method"] == "dense"}
methods = list(dict.fromkeys(row["method"] for row in record.rows))
lines = []
for task in TASKS:
    for method in methods:
        here = [r for r in record.rows if (r["task"], r["method"]) == (task, method)]
        each = {row["asked"]: f"{100 * row['accuracy']:.0f} %" for row in here}
        lines.append((task, method, *(each.get(ratio, "") for ratio in (1.0, *RATIOS))))
told = table(
    ("task", "method", *(f"{r:g}x" for r in (1.0, *RATIOS))), lines, left=("task", "method")
)
unsolved = [task for task, share in solved.items() if share < SOLVED]
if unsolved:
    told += f"\n\nThe dense model does not solve {', '.join(unsolved)}: more steps are needed."
(folder / "table.md").write_text(told + "\n")
accuracy_by_ratio(record.rows).savefig(folder / "recall.png")
print(f"\n{told}\n\nwrote {folder}")
