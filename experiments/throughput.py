# %% [markdown]
# # More sequences in the same bytes
#
# A server that decodes has a fixed number of bytes for keys and values. How many sequences fit into
# them decides how many tokens come out of one pass over the weights. Here one model answers the
# same queue of requests under several budgets: never merging, and compressing 4 and 8 times.
#
# The weights are random, and the threshold on the merge logits is set for the ratios: what decoding
# costs depends on the lengths of the rows alone. Run it as it is (some 15 minutes on two cores), or
# cell by cell. Figures and plot go to `runs/throughput/` below the current directory.

# %%
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the package
from benchmarks import random_model
from benchmarks.throughput import MODEL, RATIOS, SEQUENCE_BYTES, about, compare

# %% [markdown]
# ## The model
# A threshold for every ratio, by bisection; heads differ in how much they merge.

# %%
model = random_model.make(MODEL, RATIOS[1:])
for ratio, (least, mean, greatest) in model.row_ratios.items():
    print(f"asked {ratio}x: measured {mean}x, rows from {least}x to {greatest}x")

# %% [markdown]
# ## The queue, under every budget
# Budgets are counted in dense sequences. The engine admits what fits; a sequence that finds no page
# any more waits, and is read again later.

# %%
BUDGETS = (1, 2, 4)
results = []
for sequences in BUDGETS:
    results.append(compare(model, sequences * SEQUENCE_BYTES, requests=8 * sequences))
    print(f"{results[-1]['kv_bytes'] / 2**20:.0f} MiB")
    for name, one in results[-1]["served"].items():
        print(
            f"  {name}: {one['sequences']:5.1f} sequences, {one['tokens_per_second']:6.1f} tokens/s"
        )

# %% [markdown]
# ## Sequences and tokens a second against the budget

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
budgets = [result["kv_bytes"] / 2**20 for result in results]
panels = (("sequences", "sequences in the cache"), ("tokens_per_second", "new tokens per second"))
for axis, (what, label) in zip(axes, panels, strict=True):
    for ratio in RATIOS:
        values = [result["served"][f"{ratio}x"][what] for result in results]
        axis.plot(budgets, values, marker="o", label=f"{ratio}x" if ratio > 1 else "dense")
    axis.set(xlabel="bytes of keys and values (MiB)", ylabel=label, ylim=(0, None))
axes[0].legend(frameon=False)

folder = Path("runs/throughput")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "throughput.png", dpi=150)
report = about(model, "python experiments/throughput.py") | {"results": results}
(folder / "throughput.json").write_text(json.dumps(report, indent=2) + "\n")
print(f"wrote {folder}/throughput.json and throughput.png")
