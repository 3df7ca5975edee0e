# %% [markdown]
# # The paper's recipe in small: a Llama of a million parameters, retrofitted to 4x
#
# Trains a Llama of a million parameters on the Python standard library's text, retrofits it with
# DMC to a cache a quarter the size, and compares it, on files that none of this has seen, with
# what the same number of further steps makes of the dense model and of grouped-query attention
# with as small a cache. About ten minutes on two CPU cores; run it again and it goes on where it
# was.

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
import dataclasses
import json
import time

from absl import logging

import dmc_jax as dmc
from dmc_jax.baselines.gqa import mean_pool_kv_heads
from dmc_jax.checkpoints.models import LoadedModel
from dmc_jax.checkpoints.run_directory import latest
from dmc_jax.checkpoints.states import open_for_saving
from dmc_jax.config import CompressionConfig, ModelConfig, StageConfig
from dmc_jax.data.prepare import prepare
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.perplexity import Evaluation
from dmc_jax.evaluation.report import write_report
from dmc_jax.evaluation.tables import ComparisonRow, collapse, comparison_table, head_table
from dmc_jax.model.causal_attention import evaluation_attention
from dmc_jax.policies.dmc import DMC
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import state_of

logging.set_verbosity(logging.INFO)
started = time.perf_counter()

# %% [markdown]
# ## Text, model, retrofit

# %%
run = dmc.RunConfig.named("tiny_4x")
data = prepare(run.data.path)
dmc_dir = dmc.train(run)

# %% [markdown]
# ## Two things to compare it with, from the same pretrained model
#
# Dense, and grouped-query attention with one KV head for every four (Ainslie et al. 2023: KV heads
# averaged, then trained on). Both take as many steps as the three stages of the retrofit together,
# with a schedule of their own. GQA learns from the pretrained model as DMC does; the dense model is
# that model, and learns from the text alone.

# %%
further_steps = run.zero_out.steps + run.retrofit.steps + run.finetune.steps


def continue_training(
    name: str, model: ModelConfig, init_from: Path, compression: CompressionConfig
) -> Path:
    """Train on as an ordinary language model; returns the run's directory."""
    return dmc.train(
        dataclasses.replace(
            run,
            name=name,
            model=model,
            compression=compression,
            stages="pretrain",
            init_from=str(init_from),
            pretrain=StageConfig(
                steps=further_steps,
                learning_rate=run.finetune.learning_rate,
                final_learning_rate=run.finetune.final_learning_rate,
                shape="cosine",
                warmup=20,
            ),
        )
    )


def average_kv_heads(source: LoadedModel, kv_heads: int, output: Path) -> LoadedModel:
    """A checkpoint of the pretrained model with fewer KV heads."""
    if latest(output) is None:
        params, config = mean_pool_kv_heads(source.params, source.config, kv_heads)
        about = dataclasses.replace(
            source.metadata, model=config, run=dataclasses.replace(run, model=config)
        )
        with open_for_saving(output, "pretrain", keep=1) as saver:
            saver.save(0, state_of(params, make_optimizer(run.optimizer, 1.0)), {}, about)
    return dmc.load(output)


base = dmc.load(dmc_dir / "pretrain")
grouped = average_kv_heads(base, 1, Path(run.output) / "tiny_gqa_start")
alone = dataclasses.replace(run.compression, distillation=0.0)
taught = dataclasses.replace(run.compression, teacher=str(base.path))
dense_dir = continue_training("tiny_dense", base.config, base.path, alone)
gqa_dir = continue_training("tiny_gqa", grouped.config, grouped.path, taught)

# %% [markdown]
# ## The table
#
# Measured on the test files: neither training, nor the choice of the inference threshold, nor the
# figures printed along the way have read them.


# %%
def measure(model: LoadedModel) -> Evaluation:
    """The whole test split, with the decisions that the model makes at inference."""
    return dmc.evaluate(
        model.params,
        model.config,
        data,
        "test",
        policy=model.policy,
        length=run.data.length,
        batch=16,
        dtype=run.compute_dtype,
        attention=evaluation_attention(run.attention, run.attention_block),
    )


rows = []
for name, directory, steps in (
    ("dense, continued", dense_dir, further_steps),
    ("GQA 4 -> 1 KV head", gqa_dir, further_steps),
    ("DMC", dmc_dir, further_steps),
    ("dense, before", base.path, 0),
):
    model = dmc.load(directory)
    measured = measure(model)
    note = None
    if isinstance(model.policy, DMC):
        note = collapse(measured.ratio_by_layer, run.compression.ratio)
    rows.append(ComparisonRow(name, steps, measured, model.config, note or ""))
table = comparison_table(rows)

# %% [markdown]
# ## What it writes, and which heads compress how much

# %%
prompt = "def read_lines(path):\n    "
sampling = dmc.SamplingParams(max_new_tokens=120, temperature=0.7, seed=run.seed)
written = dmc.Engine.from_checkpoint(dmc_dir).generate(prompt, sampling)[0]
report = write_report(dmc_dir)
minutes = (time.perf_counter() - started) / 60
(report / "comparison.md").write_text(table + "\n")
(report / "comparison.json").write_text(
    json.dumps(
        {
            "machine": machine("make demo-train"),
            "minutes": minutes,
            "data": data.manifest["source"],
            "split": "test",
            "rows": [
                {"name": r.name, "steps": r.steps, "note": r.note}
                | dataclasses.asdict(r.evaluation)
                | {"cache_bytes_at_256_tokens": r.evaluation.cache_bytes(r.config, 256)}
                for r in rows
            ],
        },
        indent=1,
    )
    + "\n"
)

print(f"\n{prompt}{written.text}\n")
print(
    f"({written.tokens_per_second:.0f} tokens/s; cache {written.live_cache_bytes:,} bytes where a "
    f"dense one takes {written.dense_cache_bytes:,}: {written.ratio:.2f} tokens per slot)\n"
)
print("Tokens per slot, by layer and KV head (DMC, test files):\n")
print(head_table(dataclasses.asdict(rows[2].evaluation)))
print(f"\nTest files, {rows[0].evaluation.tokens:,} tokens:\n\n{table}")
print(f"\nReport with plots: {report}   (took {minutes:.1f} minutes)")
