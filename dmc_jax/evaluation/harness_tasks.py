"""Tasks of lm-evaluation-harness and of one's own: found, put to a model, shown."""

import contextlib
import difflib
import json
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from dmc_jax.errors import UserError
from dmc_jax.evaluation.harness import HarnessModel

# NVIDIA's card of Llama-2-7B-DMC-8x: its tasks, and the examples that stand before each question.
MODEL_CARD = {
    "mmlu": 5,
    "gsm8k": 5,
    "hellaswag": 10,
    "arc_easy": 0,
    "arc_challenge": 25,
    "piqa": 0,
    "winogrande": 5,
}

_RESAMPLES = 1_000  # for the standard errors of what is not a mean
_SEEDS = 0, 1234, 1234  # of Python, NumPy and the choice of examples, as the library has them
_SHOWN = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
_SHOWN += ("higher_is_better",)


def find_tasks(
    names: Sequence[str],
    *,
    folder: Path | None = None,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Load tasks and their data.

    Args:
        names: of tasks, groups or tags, or patterns of them such as mmlu_*; "model_card" stands for
            `MODEL_CARD`.
        folder: with task files of one's own, which outrank those of the library.
        num_fewshot: examples before each question; None: as the task has it, or none. A task whose
            file says none keeps to it.
        metadata: for tasks that make their data, such as RULER's.

    Returns:
        What `run_tasks` reads.

    Raises:
        UserError: an unknown task, one whose data or libraries are not here, one that runs what a
            model wrote, or another number of examples than the card's.
    """
    if "model_card" in names and num_fewshot is not None:
        raise UserError("--num_fewshot: the tasks of model_card have their own")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task_path: {folder} is no folder")
    shots: dict[str, int | None] = {}
    for name in names:
        shots |= MODEL_CARD if name == "model_card" else {name: num_fewshot}
    random.seed(_SEEDS[0])  # of tasks that make their data
    np.random.seed(_SEEDS[1])
    manager = _manager(shots, folder, dict(metadata or {}))
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, count in shots.items():
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists all"
            raise UserError(f"--tasks: there is no task {name}: {hint}")
        loaded = _load(manager, name, matching)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            kept = count is None or own == 0
            task.set_config("num_fewshot", (own or 0) if kept else count)
            task.set_fewshot_seed(_SEEDS[2])
        for kind in found:
            found[kind] |= loaded[kind]
    return found


def _manager(names: Iterable[str], folder: Path | None, metadata: dict[str, Any]) -> TaskManager:
    """What knows the tasks; those of the library take seconds to list, where no other will do."""
    if folder is None:
        return TaskManager(metadata=metadata)
    own = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    if all(name in own.all_subtasks for name in names):
        return own
    return TaskManager(include_path=str(folder), metadata=metadata)


def _load(manager: TaskManager, name: str, matching: list[str]) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some say what they do
            loaded = manager.load(matching)
    except ImportError as error:
        raise UserError(f"task {name} needs a library that is not here: {error}") from None
    except OSError as error:
        raise UserError(
            f"the data of task {name} cannot be had ({error}): where there is a network, run this "
            "with HF_HOME=DIR, bring DIR here and set HF_HOME=DIR HF_HUB_OFFLINE=1; or write a "
            "task file whose dataset_path is json and whose data_files lie here, and name its "
            "folder with --task_path"
        ) from None
    unsafe = [task for task, x in loaded["tasks"].items() if getattr(x, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(f"task {unsafe[0]} runs what a model writes, which is not done here")
    return dict(loaded)


def run_tasks(
    model: HarnessModel,
    tasks: dict[str, Any],
    *,
    limit: float | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Put all questions of some tasks to a model.

    Args:
        model: which.
        tasks: from `find_tasks`.
        limit: questions of each task at most; below 1, the share of them.
        chat: make conversations of them, by the model's chat template.

    Returns:
        As JSON: the library's "results" by task, "groups" if there are, "versions", "n-shot" and
        "n-samples".

    Raises:
        UserError: as the methods of `HarnessModel`.
    """
    # Its pool of processes would be forks, which JAX's threads do not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it is doing
        results = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    shown = {name: results[name] for name in _SHOWN if name in results}
    return json.loads(json.dumps(shown, default=handle_non_serializable))


def as_text(results: dict[str, Any]) -> str:
    """Show what `run_tasks` found, as the library does: in Markdown."""
    columns = [column for column in ("results", "groups") if column in results]
    return "\n".join(make_table(results, column) for column in columns)
