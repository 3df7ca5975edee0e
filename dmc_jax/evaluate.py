"""Measure a model on held-out text: `python -m dmc_jax.evaluate --checkpoint=DIR`.

Loss, perplexity, bits per byte and tokens per cache slot, with the decisions of inference; beside a
retrofitted model stands the dense one that it came from. With `--tasks=hellaswag,arc_easy` it
answers the questions of lm-evaluation-harness instead, known answers through the policy and new
ones by the engine. Exit codes: 0 done, 2 bad input or flags, 1 a failure.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging
from jax.sharding import Mesh

from dmc_jax import commands
from dmc_jax.checkpoints.gates import StoredGates, check_base, gates_for
from dmc_jax.checkpoints.models import (
    LoadedModel,
    StoredModel,
    check_tokenizer_of,
    find_model,
    load_tokenizer_of,
)
from dmc_jax.config import MeshConfig, RunConfig
from dmc_jax.data.prepared import PreparedData, open_data
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.evaluation.perplexity import Evaluation, evaluate
from dmc_jax.evaluation.tables import evaluation_text, headline
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.prompts import parse_bytes
from dmc_jax.inference.requests import Result
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.model.causal_attention import choose_attention, evaluation_attention, over_int8
from dmc_jax.model.llama import unstack_layers
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
_LENGTH = flags.DEFINE_integer(
    "length",
    None,
    "Tokens per window; default: as in training. With --tasks, those of a question and its answer "
    "at most; default: all that the model knows.",
)
_BATCH = flags.DEFINE_integer("batch", 8, "Windows, or questions, at a time.")
_TASKS = flags.DEFINE_list(
    "tasks",
    None,
    "Tasks, groups or tags of lm-evaluation-harness, or patterns of their names; model_card: the "
    "seven of NVIDIA's card, each with its number of examples.",
)
_TASK_PATH = flags.DEFINE(
    commands.PATH, "task_path", None, "Folder with task files (YAML) of one's own."
)
_TASK_METADATA = flags.DEFINE_string(
    "task_metadata",
    "{}",
    'JSON for tasks that make their data, such as RULER\'s: {"max_seq_lengths": [4096]}. Their '
    "tokenizer is the one beside the model's, unless it names another.",
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Examples before each question, but for tasks that say none; default: as the task has it.",
    lower_bound=0,
)
_LIMIT = flags.DEFINE_float(
    "limit", None, "Questions of each task at most; below 1, the share of them.", lower_bound=0
)
_APPLY_CHAT_TEMPLATE = flags.DEFINE_boolean(
    "apply_chat_template", False, "Ask in conversations, by the model's chat template."
)
_KV_BYTES = flags.DEFINE_string(
    "kv_bytes", "2GiB", "Keys and values in the cache, at most, where tasks let the model write."
)
_TOKENIZER = flags.DEFINE(
    commands.PATH,
    "tokenizer",
    None,
    "Its file, where it did not come along or is no longer where it was.",
)
_ADD_BOS = flags.DEFINE_bool(
    "add_bos", None, "Whether questions begin with BOS; default: as the model's files say."
)
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
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype",
    None,
    ["int8"],
    "Keep keys and values as pages of int8 do; beside it stands the dense model as it is.",
)
_JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of text.")

_MESH = MeshConfig(data=1, fsdp=-1)  # all devices share the windows, and each has a part of a model


_OF_TEXT = _DATA, _SPLIT, _WINDOWS, _DENSE
_OF_TASKS = (
    *(_TASK_PATH, _TASK_METADATA, _NUM_FEWSHOT, _LIMIT, _APPLY_CHAT_TEMPLATE),
    *(_KV_BYTES, _TOKENIZER, _ADD_BOS),
)


def main() -> None:
    """Measure what the flags name and print it."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    for flag in _OF_TASKS if _TASKS.value is None else _OF_TEXT:
        if flag.present:
            goes = "goes with --tasks" if _TASKS.value is None else "is of text, not of --tasks"
            raise UserError(f"--{flag.name} {goes}: leave it out")
    stored = find_model(_CHECKPOINT.value)
    commands.show_notes(stored.notes)
    about, text = _measure_text(stored) if _TASKS.value is None else _measure_tasks(stored)
    print(json.dumps(about) if _JSON.value else text)


def _policy(model: LoadedModel) -> tuple[Policy, StoredGates | None]:
    """What the rows keep, as the flags say, and the file of gates that it is from."""
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
    if _KV_DTYPE.value and policy.name in BUDGETED:
        raise UserError(
            f"--kv_dtype: whole sequences with {policy.name} are not rounded as pages are; leave "
            "the flag out, or take another policy"
        )
    return policy, gates


def _measure_text(stored: StoredModel) -> tuple[dict, str]:
    """Measure held-out text, as JSON and as text."""
    mesh = make_mesh(_MESH)
    model = stored.load(mesh)
    policy, _ = _policy(model)
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
    about = _about(model, policy) | {
        "data": str(data.path),
        "split": _SPLIT.value,
        "length": length,
        "evaluation": dataclasses.asdict(
            _measure(model, policy, data, length, mesh, _KV_DTYPE.value)
        ),
    }
    del model  # two models at a time would not fit where one just does
    about["dense"] = reference and {
        "checkpoint": str(reference.path),
        "evaluation": dataclasses.asdict(
            _measure(reference.load(mesh), reference.policy, data, length, mesh)
        ),
    }
    return about, evaluation_text(about)


def _measure_tasks(stored: StoredModel) -> tuple[dict, str]:
    """Answer the questions of tasks: the figures as JSON and as text."""
    try:
        from dmc_jax.evaluation.harness import HarnessModel
        from dmc_jax.evaluation.harness_tasks import as_text, find_tasks, run_tasks
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}): run `pip install lm-eval==0.4.13`"
        ) from error
    length = stored.config.max_length if _LENGTH.value is None else _LENGTH.value
    if not 2 <= length <= stored.config.max_length:
        raise UserError(
            f"--length: expected 2 to {stored.config.max_length}, what {stored.path} was made for; "
            f"got {length}"
        )
    metadata = _task_metadata()
    tokenizer = load_tokenizer_of(stored, _TOKENIZER.value, _ADD_BOS.value)
    path = Path(_TOKENIZER.value or stored.tokenizer)
    kv_bytes, dtype = parse_bytes(_KV_BYTES.value), _dtype(stored)
    attention = choose_attention()
    tasks = find_tasks(
        _TASKS.value,
        folder=_TASK_PATH.value and Path(_TASK_PATH.value),
        num_fewshot=_NUM_FEWSHOT.value,
        metadata={"tokenizer": str(path.parent)} | metadata,
    )
    model = stored.load(dtype=dtype)
    policy, gates = _policy(model)
    adapter = HarnessModel(
        *(model.params, model.config, tokenizer, policy),
        write=_writer(
            *(model, tokenizer, policy, gates),
            max_length=length,
            kv_bytes=kv_bytes,
            dtype=dtype,
            kv_dtype=_KV_DTYPE.value,
        ),
        tokenizer_path=path,
        batch=_BATCH.value,
        max_length=length,
        dtype=dtype,
        attention=over_int8(attention) if _KV_DTYPE.value else attention,
    )
    chat = _APPLY_CHAT_TEMPLATE.value
    results = run_tasks(adapter, tasks, limit=_LIMIT.value, chat=chat)
    ratio = adapter.tokens_per_slot
    about = _about(model, policy) | {"length": length, "chat": chat, "limit": _LIMIT.value}
    about |= {"tasks": results, "ratio": ratio}
    return about, f"{headline(about)}\n{ratio:.2f} tokens per slot\n\n{as_text(results)}"


def _writer(
    model: LoadedModel,
    tokenizer: Tokenizer,
    policy: Policy,
    gates: StoredGates | None,
    **options: Any,
) -> Callable[..., Iterator[tuple[int, Result]]]:
    """Who continues prompts: an engine, which is there only where a task asks for that."""

    def write(prompts, params):
        engine = Engine(
            unstack_layers(model.params, model.config, options["dtype"]),
            model.config,
            tokenizer,
            policy=policy,
            gates=gates,
            max_sequences=_BATCH.value,
            **options,
        )
        for event in engine.stream(prompts, [SamplingParams(**each) for each in params]):
            if event.finish_reason == "pages":
                raise UserError(
                    f"--kv_bytes={_KV_BYTES.value}: too few for a question of "
                    f"{event.result.prompt_tokens} tokens and its answer"
                )
            if event.finish_reason:
                yield event.sequence, event.result  # a new engine counts from 0

    return write


def _task_metadata() -> dict[str, Any]:
    try:
        found = json.loads(_TASK_METADATA.value)
    except ValueError as error:
        raise UserError(f"--task_metadata is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"--task_metadata: expected a JSON object, got {_TASK_METADATA.value}")
    return found


def _dense_model(model: StoredModel, policy: Policy) -> StoredModel | None:
    """The model before the retrofit: this run's pretraining, else what the run started from.

    Of a dense model that runs with another policy, or in int8, it is that model itself.
    """
    if _DENSE.value:
        dense = find_model(_DENSE.value)
        if not isinstance(dense.policy, Dense):
            raise UserError(f"--dense: {dense.path} merges; name a dense checkpoint")
        return dense
    if isinstance(model.policy, Dense):
        itself = isinstance(policy, Dense) and not _KV_DTYPE.value
        return None if itself else find_model(_CHECKPOINT.value)
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
    model: LoadedModel,
    policy: Policy,
    data: PreparedData,
    length: int,
    mesh: Mesh,
    kv_dtype: str | None = None,
) -> Evaluation:
    """Evaluate as the end of a stage does: in the precision of training, but for `kv_dtype`."""
    check_tokenizer_of(model, data)
    run = model.metadata.run or RunConfig  # the class has the defaults
    attention = evaluation_attention(run.attention, run.attention_block, mesh)
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
        attention=over_int8(attention) if kv_dtype else attention,
        mesh=mesh,
    )


def _dtype(model: StoredModel) -> str:
    return _DTYPE.value or model.metadata.compute_dtype


def _about(model: LoadedModel, policy: Policy) -> dict:
    return {
        "checkpoint": str(model.path),
        "stage": model.metadata.stage,
        "step": model.metadata.step,
        "dtype": _dtype(model),
        "kv_dtype": _KV_DTYPE.value or _dtype(model),
        "mode": policy.name,
        "policy": to_json(policy),
        "threshold": getattr(policy, "threshold", 0.0),
    }


if __name__ == "__main__":
    commands.run(main)
