"""KV heads of each layer within a budget: `python -m dmc_jax.search_kv_heads --budget=0.5 ...`.

Measures on held-out text what the loss of a dense model becomes when the KV heads of one layer are
averaged into fewer, for every layer and number; chooses those numbers whose changes have the least
sum within the budget; measures that choice, and the same number everywhere; and writes the model
with so many heads, to be trained on (`--config=configs/gqa.py:OUTPUT`), with all figures in
OUTPUT/kv_heads.json. It takes a pass over the text for each layer and number.

Exit codes: 0 done; 1 a failure such as a full disk; 2 bad input or flags; 130 interrupted.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags, logging

from dmc_jax import commands
from dmc_jax.baselines.gqa import repeat_kv_heads, tie_kv_heads
from dmc_jax.baselines.kv_heads_search import (
    best_assignment,
    heads_within,
    kv_head_options,
    loss_changes,
    predicted_change,
    uniform_assignment,
)
from dmc_jax.checkpoints.models import StoredModel, check_tokenizer_of, find_model
from dmc_jax.checkpoints.states import quiet_orbax
from dmc_jax.config import MeshConfig, RunConfig
from dmc_jax.data.prepared import PreparedData, open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.perplexity import evaluate
from dmc_jax.files import write_text
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.formats import open_source, with_tokenizer
from dmc_jax.interop.kv_heads import with_kv_heads
from dmc_jax.interop.output import new_folder, progress_of
from dmc_jax.model.causal_attention import evaluation_attention
from dmc_jax.model.sharding import make_mesh
from dmc_jax.policies.dense import Dense

_CHECKPOINT = flags.DEFINE(
    commands.PATH, "checkpoint", None, "Dense model, of any format.", required=True
)
_DATA = flags.DEFINE(
    commands.PATH,
    "data",
    None,
    "Folder made by prepare_data with the model's tokenizer, or several, comma-separated.",
    required=True,
)
_OUTPUT = flags.DEFINE(
    commands.PATH, "output", None, "Folder to write the model to; must not exist.", required=True
)
_BUDGET = flags.DEFINE_float(
    "budget", 0.5, "Bytes that the cache may take, as a fraction of those that it takes now."
)
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_WINDOWS = flags.DEFINE_integer("windows", 16, "Windows to read of each folder, at most.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens per window; default: as the model is evaluated on, 512 at most."
)
_BATCH = flags.DEFINE_integer("batch", 8, "Windows at a time.")

FILE = "kv_heads.json"
_MOST_TOKENS = 512  # of a window that nobody asked for
_MESH = MeshConfig(data=1, fsdp=-1)  # as `evaluate` spreads a model


def main() -> None:
    """Search, write the model and print the table."""
    logging.set_verbosity(logging.WARNING)  # saving a checkpoint is talkative
    quiet_orbax()
    began = time.monotonic()
    model = find_model(_CHECKPOINT.value)
    if not isinstance(model.policy, Dense):
        raise UserError(
            f"--checkpoint: {model.path} merges; search the model from before its retrofit, and "
            "retrofit what comes out"
        )
    kv_head_options(model.config)  # complains where there is nothing to choose
    heads = heads_within(model.config, _BUDGET.value)
    datas = [open_data(path.strip()) for path in _DATA.value.split(",")]
    for data in datas:
        check_tokenizer_of(model, data)
    source = with_tokenizer(open_source(_CHECKPOINT.value))
    commands.show_notes(source.notes)
    size = sum(tensor.nbytes for tensor in source.tensors.values())
    with new_folder(Path(_OUTPUT.value), size) as folder:
        found = _search(model, datas, heads)
        chosen = with_kv_heads(source, tuple(found["rows"][-1]["kv_heads"]))
        size = sum(tensor.nbytes for tensor in chosen.tensors.values())
        with progress_of(f"writing {_OUTPUT.value}", size) as progress:
            write_dmc_jax(chosen, folder, None, progress)
        command = "python -m dmc_jax.search_kv_heads " + " ".join(sys.argv[1:])
        about = {"machine": machine(command), "seconds": time.monotonic() - began} | found
        write_text(folder / FILE, json.dumps(about, indent=1) + "\n")
    print(
        f"\n{_table(found)}\n\nwrote {_OUTPUT.value}; to train it on: python -m dmc_jax.train "
        f"--config=configs/gqa.py:{_OUTPUT.value} --config.data.path={_DATA.value}"
    )


def _search(model: StoredModel, datas: Sequence[PreparedData], heads: int) -> dict:
    """Measure, choose within so many heads, measure what was chosen; the last row is the choice."""
    config = model.config
    passes = sum(len(options) - 1 for options in kv_head_options(config))
    print(
        f"{model.path}: {config.kv_rows} KV heads in {config.layers} layers, {heads} within the "
        f"budget; {passes} measurements of one layer each",
        flush=True,
    )

    def report(layer: int, count: int, change: float) -> None:
        own = config.kv_heads_by_layer[layer]
        print(f"layer {layer}: {own} -> {count} KV heads: {change:+.4f} nats a token", flush=True)

    length = _LENGTH.value or min(model.metadata.evaluation_length, _MOST_TOKENS)
    loss_of = functools.cache(_measurement(model, datas, length))
    changes = loss_changes(config, loss_of, report)
    chosen = {
        "dense": config.kv_heads_by_layer,
        "uniform": uniform_assignment(config, heads),
        "search": best_assignment(changes, heads),
    }
    before = loss_of(chosen["dense"])
    return {
        "checkpoint": _CHECKPOINT.value,
        "data": _DATA.value,
        "split": _SPLIT.value,
        "windows": _WINDOWS.value,
        "length": length,
        "budget": _BUDGET.value,
        "rows": [
            {
                "name": name,
                "kv_heads": counts,
                "cache": sum(counts) / config.kv_rows,
                "loss_predicted": before + predicted_change(changes, counts),
                "loss_measured": loss_of(counts),
            }
            for name, counts in chosen.items()
        ],
        "changes": changes,
    }


def _measurement(
    model: StoredModel, datas: Sequence[PreparedData], length: int
) -> Callable[[tuple[int, ...]], float]:
    """A function that gives the loss with so many KV heads in each layer, in nats a token."""
    mesh = make_mesh(_MESH)
    # Numbers that do not divide a layer's heads need more of them, to be tied.
    options = kv_head_options(model.config)
    params, config = repeat_kv_heads(
        model.load(mesh).params, model.config, tuple(math.lcm(*counts) for counts in options)
    )
    run = model.metadata.run or RunConfig  # the class has the defaults
    attention = evaluation_attention(run.attention, run.attention_block, mesh)

    def loss_of(kv_heads: tuple[int, ...]) -> float:
        tied = tie_kv_heads(params, config, kv_heads)
        measured = [
            evaluate(
                tied,
                config,
                data,
                _SPLIT.value,
                policy=Dense(),
                length=length,
                batch=_BATCH.value,
                limit=_WINDOWS.value,
                dtype=model.metadata.compute_dtype,
                attention=attention,
                mesh=mesh,
                count_bytes=False,
            )
            for data in datas
        ]
        nats = sum(one.loss * one.tokens for one in measured)
        return nats / sum(one.tokens for one in measured)

    return loss_of


def _table(found: dict) -> str:
    """The rows of what was found, for people."""
    lines = [f"{'':<9}{'cache':>7}{'predicted':>11}{'measured':>10}  KV heads"]
    for row in found["rows"]:
        counts = row["kv_heads"]
        said = str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))
        lines.append(
            f"{row['name']:<9}{100 * row['cache']:>5.1f} %{row['loss_predicted']:>11.4f}"
            f"{row['loss_measured']:>10.4f}  {said}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main)
