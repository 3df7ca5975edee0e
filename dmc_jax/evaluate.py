"""Measure a model on held-out text: `python -m dmc_jax.evaluate --checkpoint=DIR`.

Loss, perplexity, bits per byte and tokens per cache slot, with the decisions of inference; beside a
retrofitted model stands the dense one that it came from. Exit codes: 0 done, 2 bad input or flags,
1 a failure.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

from absl import flags, logging
from jax.sharding import Mesh

from dmc_jax import commands
from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import (
    LoadedModel,
    StoredModel,
    check_tokenizer_of,
    find_model,
    open_model,
)
from dmc_jax.config import MeshConfig, RunConfig
from dmc_jax.data.prepared import PreparedData, open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.perplexity import Evaluation, evaluate
from dmc_jax.evaluation.tables import head_table
from dmc_jax.model.causal_attention import evaluation_attention
from dmc_jax.model.sharding import make_mesh
from dmc_jax.policies.choice import BUDGETED, POLICIES, Gated, policy_for, to_json
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Policy

_CHECKPOINT = flags.DEFINE(
    commands.PATH,
    "checkpoint",
    None,
    "A run's directory, a stage of it, a step, or another format's folder.",
    required=True,
)
_DATA = flags.DEFINE(
    commands.PATH,
    "data",
    None,
    "Folder made by prepare_data; default: what the model was trained on.",
)
_SPLIT = flags.DEFINE_string("split", "validation", "train, validation or test.")
_WINDOWS = flags.DEFINE_integer("windows", None, "Windows to read at most; default: all.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens per window; default: as in training.")
_BATCH = flags.DEFINE_integer("batch", 8, "Windows at a time.")
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Merge logit above which to merge; default: the checkpoint's."
)
_POLICY = flags.DEFINE_enum(
    "policy", None, list(POLICIES), "What rows keep; default: what the model was trained for."
)
_GATES = flags.DEFINE(
    commands.PATH,
    "gates",
    None,
    "File of gates, or the name of some that come along: they make a pretrained model compress as "
    "it is.",
)
_RATIO = flags.DEFINE_float(
    "ratio", None, "Tokens per slot of gates, of a budget that grows, or of --policy=stride."
)
_BUDGET = flags.DEFINE_integer(
    "budget", None, f"Slots of a row, with --policy={'|'.join(BUDGETED)}; with --ratio, the least."
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens",
    None,
    "With --policy=snapkv: tokens of each document that are its prompt, which is cut at its end.",
)
_DENSE = flags.DEFINE(
    commands.PATH,
    "dense",
    None,
    "Dense checkpoint to compare with; default: the one before the retrofit.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of the computation; default: that of training; for other formats bfloat16 where the weights "
    "are, and else float32.",
)
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of text.")

_MESH = MeshConfig(data=1, fsdp=-1)  # all devices share the windows, and each has a part of a model


def main() -> None:
    """Measure what the flags name and print it."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    mesh = make_mesh(_MESH)
    model = open_model(_CHECKPOINT.value, mesh)
    commands.show_notes(model.notes)
    own = model.own_gates(_POLICY.value)
    gates = gates_for(_GATES.value, model.config, _RATIO.value, _THRESHOLD.value, own)
    if gates is not None:
        check_base(gates, model.params, model.config)
    policy = policy_for(
        model.policy,
        name=_POLICY.value,
        budget=_BUDGET.value,
        ratio=_RATIO.value,
        gates=gates and gates.policy,
        prompt=_PROMPT_TOKENS.value,
    )
    if _THRESHOLD.value is not None:
        if not isinstance(policy, DMC | Gated):
            raise UserError(
                f"--threshold: with policy {policy.name} {model.path} decides nothing; leave the "
                "flag out or name a checkpoint of the retrofit or finetune stage"
            )
        policy = dataclasses.replace(policy, threshold=_THRESHOLD.value)
    if not (_DATA.value or model.metadata.data):
        raise UserError(f"{model.path} was not trained here: name a prepared folder with --data")
    if not _DATA.value and not Path(model.metadata.data).exists():
        raise UserError(
            f"{model.metadata.data}, the data of {model.path}, is not there any more: say where it "
            "is with --data=DIR"
        )
    data = open_data(_DATA.value or model.metadata.data)
    length = _LENGTH.value
    if length is None:
        length = model.metadata.evaluation_length
    reference = _dense_model(model, policy)
    measured = _measure(model, policy, data, length, mesh)
    about = _about(model, policy, data, length, measured)
    del model  # two models at a time would not fit where one just does
    about["dense"] = reference and {
        "checkpoint": str(reference.path),
        "evaluation": dataclasses.asdict(
            _measure(reference.load(mesh), reference.policy, data, length, mesh)
        ),
    }
    print(json.dumps(about) if _JSON.value else _as_text(about))


def _dense_model(model: StoredModel, policy: Policy) -> StoredModel | None:
    """The model before the retrofit: this run's pretraining, else what the run started from.

    Of a dense model that runs with another policy it is that model itself.
    """
    if _DENSE.value:
        dense = find_model(_DENSE.value)
        if not isinstance(dense.policy, Dense):
            raise UserError(f"--dense: {dense.path} merges; name a dense checkpoint")
        return dense
    if isinstance(model.policy, Dense):
        return None if isinstance(policy, Dense) else find_model(_CHECKPOINT.value)
    if model.metadata.run is None:
        return None
    start = model.metadata.run.init_from
    for place in (model.path.parent.parent / "pretrain", *([start] if start else [])):
        with contextlib.suppress(UserError):  # it may be gone by now
            dense = find_model(place)
            if isinstance(dense.policy, Dense):
                return dense
    return None


def _measure(
    model: LoadedModel, policy: Policy, data: PreparedData, length: int, mesh: Mesh
) -> Evaluation:
    """Evaluate as the end of a stage does: in the precision of training."""
    check_tokenizer_of(model, data)
    run = model.metadata.run or RunConfig  # the class has the defaults
    return evaluate(
        model.params,
        model.config,
        data,
        _SPLIT.value,
        policy=policy,
        length=length,
        batch=_BATCH.value,
        limit=_WINDOWS.value,
        dtype=_dtype(model),
        attention=evaluation_attention(run.attention, run.attention_block, mesh),
        mesh=mesh,
    )


def _dtype(model: StoredModel) -> str:
    return _DTYPE.value or model.metadata.compute_dtype


def _about(
    model: LoadedModel, policy: Policy, data: PreparedData, length: int, measured: Evaluation
) -> dict:
    return {
        "checkpoint": str(model.path),
        "stage": model.metadata.stage,
        "step": model.metadata.step,
        "dtype": _dtype(model),
        "mode": policy.name,
        "policy": to_json(policy),
        "threshold": getattr(policy, "threshold", 0.0),
        "data": str(data.path),
        "split": _SPLIT.value,
        "length": length,
        "evaluation": dataclasses.asdict(measured),
    }


def _as_text(about: dict) -> str:
    ours, dense = about["evaluation"], about["dense"]
    columns = [("this model", ours)]
    if dense is not None:
        columns.append(("dense before", dense["evaluation"]))
    rows = [
        ("loss (nats a token)", "loss", ".4f"),
        ("perplexity", "perplexity", ".3f"),
        ("bits per byte", "bits_per_byte", ".4f"),
        ("tokens per slot", "ratio", ".2f"),
    ]
    merging, held_to = about["mode"] == "dmc", about["policy"].keys() & {"budget", "ratio"}
    lines = [
        f"{about['checkpoint']} ({about['stage']}, step {about['step']}, "
        + (f"merging above {about['threshold']:.4g}" if merging else about["mode"])
        + "".join(f", {name} {about['policy'][name]:g}" for name in sorted(held_to))
        + ")",
        f"{about['data']}, {about['split']}: {ours['windows']:,} windows of {about['length']:,} "
        f"tokens, {ours['tokens']:,} predicted in {about['dtype']}",
        "",
        f"{'':<20}" + "".join(f"{name:>14}" for name, _ in columns),
    ]
    lines += [
        f"{label:<20}" + "".join(f"{figures[key]:>14{form}}" for _, figures in columns)
        for label, key, form in rows
    ]
    if merging:
        where = dense and f"dense before the retrofit: {dense['checkpoint']}"
        absent = "the dense model from before the retrofit is not there; name it with --dense=DIR"
        lines += ["", where or absent, "", "tokens per slot", "", head_table(ours)]
    return "\n".join(lines)


if __name__ == "__main__":
    commands.run(main)
