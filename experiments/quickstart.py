# %% [markdown]
# # Quickstart: DMC in library calls
#
# A Llama of two layers is trained on Python source, retrofitted with Dynamic Memory Compression,
# and looked at: how much every head compresses, which tokens it merges, what it writes. It takes a
# minute or two on two CPU cores. Output goes to `data/quickstart` and `runs/` below the current
# directory; a second run goes on from what is there.
#
#     python experiments/quickstart.py        # from any folder, or as a notebook

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

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import dmc_jax as dmc
from dmc_jax.config import CompressionConfig, DataConfig, ModelConfig, StageConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.data.prepare import prepare
from dmc_jax.data.tokenizer import encode_prompt, load_tokenizer
from dmc_jax.evaluation.report import write_report
from dmc_jax.evaluation.tables import head_table
from dmc_jax.model.llama import Llama, count_parameters
from dmc_jax.policies.policy import attend_whole

logging.set_verbosity(logging.INFO)  # shows the progress of training

# %% [markdown]
# ## Text to tokens
# Without a `source` the text is the library of the running Python: nothing is downloaded. One
# worker, because more of them are processes that would import this file again.

# %%
data = prepare("data/quickstart", vocab_size=512, limit_mb=4)
for split, facts in data.manifest["splits"].items():
    print(f"{split}: {facts['tokens']:,} tokens, {facts['documents']} files")

# %% [markdown]
# ## A dense model
# Two layers with four KV heads each. A run is a dataclass; `train` takes its stages in order and
# returns its directory. A stage that is there already is not trained again.

# %%
dense_run = dmc.RunConfig(
    name="quickstart",
    model=ModelConfig(
        vocab_size=data.vocab_size,
        width=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        mlp_width=192,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=128,
        tied_embeddings=True,
    ),
    # The paper has temperature 0.1, offset 5, weight 1 and neither of the three that follow the
    # weight. With those values a schedule this short would not reach the ratio.
    dmc=DMCSettings(window=12, temperature=0.3, offset=2.0),
    compression=CompressionConfig(
        ratio=3.0, weight=2.0, per_layer=True, decision_multiplier=3.0, calibration_windows=64
    ),
    data=DataConfig(path=str(data.path), length=128, batch=16),
    stages="pretrain",
    pretrain=StageConfig(steps=400, learning_rate=5e-3, shape="cosine", warmup=20),
    zero_out=StageConfig(steps=20, learning_rate=2e-3),
    retrofit=StageConfig(steps=120, learning_rate=2e-3),
    finetune=StageConfig(steps=120, learning_rate=2e-3, final_learning_rate=2e-4, shape="cosine"),
    compute_dtype="float32",
    remat="none",
    attention_block=128,
    log_every=40,
)
print(f"{count_parameters(dense_run.model):,} parameters")
dmc.train(dense_run)

# %% [markdown]
# ## The retrofit
# `zero_out` frees one channel of every key and query for the decisions, `retrofit` raises the
# target ratio from 1, `finetune` holds it. They start from the end of `pretrain` in the same run.

# %%
run = dataclasses.replace(dense_run, stages="pretrain,zero_out,retrofit,finetune")
directory = dmc.train(run)

# %% [markdown]
# ## What to compare it with
# The small model still learns with every step, so the dense one is trained on for as many steps as
# the retrofit took. This is a run of its own that starts from a checkpoint.

# %%
steps = run.zero_out.steps + run.retrofit.steps + run.finetune.steps
dense_directory = dmc.train(
    dataclasses.replace(
        dense_run,
        name="quickstart_dense",
        init_from=str(directory / "pretrain"),
        pretrain=dataclasses.replace(run.finetune, steps=steps, warmup=20),
    )
)

# %% [markdown]
# ## How much it compresses, and what that costs
# Measured on validation text with the 0/1 decisions of inference; the ratio is tokens per slot.

# %%
dense, model = dmc.load(dense_directory), dmc.load(directory)
results = {}
for name, loaded in {"dense": dense, "DMC": model}.items():
    results[name] = dmc.evaluate(
        loaded.params,
        loaded.config,
        data,
        "validation",
        policy=loaded.policy,
        length=run.data.length,
        batch=16,
        limit=128,
    )
    print(
        f"{name}: {results[name].loss:.3f} nats a token, {results[name].bits_per_byte:.3f} bits "
        f"per byte, ratio {results[name].ratio:.2f}"
    )

# %% [markdown]
# ## Which heads compress how much

# %%
print(head_table(dataclasses.asdict(results["DMC"])))
heatmap = write_report(directory) / "ratio_per_head.png"
print(f"heatmap: {heatmap}")
if "get_ipython" in globals():  # in a notebook
    from IPython.display import Image, display

    display(Image(str(heatmap)))

# %% [markdown]
# ## Which tokens share a slot
# The attention function is an argument of the model. It returns, per layer, KV head and token,
# whether the token took a slot of its own or was merged into the one before. Each pair of brackets
# is one slot of the cache. A slot's average covers its last `window` tokens.

# %%
sentence = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n"
tokenizer = load_tokenizer(model.tokenizer)
ids = encode_prompt(tokenizer, sentence)
attend = attend_whole(model.policy, model.config, jnp.arange(len(ids))[None])
output = Llama(model.config).apply({"params": model.params}, jnp.array([ids]), attend=attend)
appends = np.concatenate([record.appends for record in output.records])[:, 0]  # [L, T, K]

ratios = np.array(results["DMC"].ratio_by_head)  # [L, K]
layer, head = np.unravel_index(np.abs(ratios - results["DMC"].ratio).argmin(), ratios.shape)
slots = []
for token, opens in zip(ids, appends[layer, :, head], strict=True):
    text = "<s>" if token == tokenizer.bos_id else tokenizer.decode([token])
    text = text.replace("\n", "\\n")
    if opens:
        slots.append(text)
    else:
        slots[-1] += f"|{text}"
print(f"layer {layer}, KV head {head}: {len(ids)} tokens in {len(slots)} slots")
print("".join(f"[{slot}]" for slot in slots))

# %% [markdown]
# ## What it writes
# Decoding token by token over a cache whose heads have lengths of their own. A model this small,
# trained this briefly, writes something of the shape of Python.

# %%
engine = dmc.Engine.from_checkpoint(model)
prompt = "def "
sampling = dmc.SamplingParams(max_new_tokens=80, temperature=0.7, top_k=20)
written = engine.generate(prompt, sampling)[0]
print(prompt + written.text)
print(
    f"\n{written.ratio:.2f} tokens per slot; {written.live_cache_bytes:,} bytes of cache in use, "
    f"dense {written.dense_cache_bytes:,}; {written.tokens_per_second:.0f} tokens/s on "
    f"{jax.default_backend()}"
)
