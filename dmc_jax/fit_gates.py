"""Make a pretrained model compress as it is: `python -m dmc_jax.fit_gates --checkpoint=DIR`.

Fits gates for delayed eviction in closed form, in two passes over some text and without training,
and measures what they do at several thresholds. The model stays as it is; the file that comes of it
goes to `decode` and `evaluate` (`--gates=FILE --ratio=2`). Exit codes: 0 done, 2 bad input or
flags, 1 a failure.
"""

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags, logging

from dmc_jax import commands
from dmc_jax.checkpoints.gates import Measured, StoredGates, model_hash, save_gates
from dmc_jax.checkpoints.models import LoadedModel, check_tokenizer_of, open_model
from dmc_jax.data.loader import Window, windows
from dmc_jax.data.prepared import PreparedData, open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.perplexity import Evaluation, evaluate
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dms import DMS
from dmc_jax.training.closed_form import fit_gates

_CHECKPOINT = flags.DEFINE(
    commands.PATH, "checkpoint", None, "A pretrained model, of any format.", required=True
)
_DATA = flags.DEFINE(
    commands.PATH,
    "data",
    None,
    "Folder made by prepare_data with the model's tokenizer.",
    required=True,
)
_OUTPUT = flags.DEFINE(commands.PATH, "output", None, "File for the gates.", required=True)
_DELAY = flags.DEFINE_integer("delay", 16, "Tokens for which every token stays.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens per window.", lower_bound=2)
_WINDOWS = flags.DEFINE_integer("windows", 24, "Of training text to fit to.", lower_bound=1)
_MEASURED = flags.DEFINE_integer("measured", 16, "Of validation text.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")

# Logits have a mean of 0 and a spread of 1 over all rows and tokens.
_THRESHOLDS = (9.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0)


def main() -> None:
    """Fit, measure and write."""
    logging.set_verbosity(logging.WARNING)
    start, output = time.perf_counter(), Path(_OUTPUT.value)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: there is no folder {output.absolute().parent}")
    model, data = open_model(_CHECKPOINT.value, dtype=_DTYPE.value), open_data(_DATA.value)
    commands.show_notes(model.notes)
    _check(model, data)
    some = _spread_out(data, "train", _WINDOWS.value)
    others = _spread_out(data, "validation", max(1, _WINDOWS.value // 6))
    fit = fit_gates(
        model.params, model.config, some, others, delay=_DELAY.value, dtype=_DTYPE.value
    )
    scores = [r2 for layer in fit.r2 for r2 in layer]
    print(
        f"R^2 of log cost on validation text: mean {np.mean(scores):.2f}, least {min(scores):.2f}"
    )
    dense = _evaluate(model, data, Dense())
    print(f"dense: {dense.loss:.4f} nats a token")
    policy = DMS(fit.gates, delay=_DELAY.value)
    table = []
    for threshold in _THRESHOLDS:
        measured = _evaluate(model, data, dataclasses.replace(policy, threshold=threshold))
        rise = 100 * math.expm1(measured.loss - dense.loss)
        print(f"threshold {threshold:4g}: ratio {measured.ratio:.2f}, perplexity {rise:+.1f} %")
        if not table or measured.ratio > table[-1].ratio:
            table.append(Measured(threshold, measured.ratio, {"perplexity_percent": rise}))
    about = {
        "fitted_tokens": len(some) * _LENGTH.value,
        "measured_tokens": dense.tokens,
        "length": _LENGTH.value,
        "r2": fit.r2,
        "seconds": round(time.perf_counter() - start),
        "machine": machine(" ".join(["python -m dmc_jax.fit_gates", *sys.argv[1:]])),
    }
    policy = dataclasses.replace(policy, threshold=table[0].threshold)
    base = model_hash(model.params, model.config)
    save_gates(output, StoredGates(policy, base, tuple(table), about))
    print(f"wrote {output}")


def _check(model: LoadedModel, data: PreparedData) -> None:
    if not isinstance(model.policy, Dense):
        raise UserError(f"{model.path} merges already: gates are for models as pretrained")
    check_tokenizer_of(model, data)
    if _LENGTH.value > model.config.max_length:
        raise UserError(
            f"--length: the model reads {model.config.max_length} tokens, got {_LENGTH.value}"
        )


def _spread_out(data: PreparedData, split: str, count: int) -> list[Window]:
    """Windows from all over a split, a batch of one each."""
    found = windows(data, split, _LENGTH.value)
    at = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int))
    return [{name: x[None] for name, x in found[int(i)].items()} for i in at]


def _evaluate(model: LoadedModel, data: PreparedData, policy: Dense | DMS) -> Evaluation:
    measure = functools.partial(evaluate, model.params, model.config, data, "validation")
    return measure(
        policy=policy,
        length=_LENGTH.value,
        batch=1,
        limit=_MEASURED.value,
        dtype=_DTYPE.value,
        count_bytes=False,
    )


if __name__ == "__main__":
    commands.run(main)
