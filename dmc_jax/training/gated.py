"""Gates for a pretrained model: closed form, then distillation from the model itself.

What is trained is the policy, a pytree, perhaps something of the model too (`adapted`; the teacher
stays as it was), and how the policy is steered to each of several ratios of tokens
over slots, of which every step of distillation draws one. With the fraction s of drops that the
step's decisions come to, and the wanted c = 1 - 1 / ratio, a step's loss is

    KL(the model, dense || the model with the policy) + price (c - s)

with predictions among the most frequent ids and those of the step's text, which are renormalised:
the whole vocabulary would be a third of the work.

The ratio's threshold keeps s at c by Newton's method. The price is the marginal divergence of a
drop, -(dKL / dthreshold) / (-ds / dthreshold), as the ratio's steps so far have measured it: so the
logits do not move together, but apart, where one drop costs more than another.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from dmc_jax.checkpoints.gates import Measured, StoredGates, model_hash
from dmc_jax.checkpoints.models import LoadedModel
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.checkpoints.states import load_params, open_for_saving
from dmc_jax.config import STAGES, RunConfig
from dmc_jax.core.gates import Gates
from dmc_jax.core.losses import Prediction, token_losses
from dmc_jax.data.loader import evaluation_batches, training_batches
from dmc_jax.data.prepared import PreparedData
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.perplexity import Evaluation, evaluate
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import leaf_path, shardings, with_shardings
from dmc_jax.policies.choice import Gated
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dms import DMS
from dmc_jax.policies.policy import attend_whole
from dmc_jax.processes import of_first
from dmc_jax.training import adapted
from dmc_jax.training.closed_form import SPREAD, fit_gates
from dmc_jax.training.optimizer import clipped_adam
from dmc_jax.training.stages import describe, evaluation_options
from dmc_jax.training.state import (
    TrainState,
    after_step,
    key_of,
    made_on,
    new_state,
    order_seed,
    restore,
)
from dmc_jax.training.step import (
    Batch,
    Metrics,
    apply_model,
    attention_for,
    noise_of,
    rate_at,
    sum_over_parts,
)

Datas = list[tuple[PreparedData, float]]
# "policy"; of every ratio "thresholds" and "prices"; "r2" of the fit; unless it is frozen, "model".
Trained = dict[str, Any]

# As `token_losses` gives them: what they are called in metrics, and their weights in `GatesConfig`.
_LOSSES = {"loss": "next_token", "distillation": "distillation"}
_TOWARDS = 0.3  # share of the way to the wanted fraction that a threshold goes in a step
_RENEWED = 0.2  # of a price in a step
_COUNTED = 2**24  # tokens of a text
_TRIED = 2  # windows of a dry run
READ = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
_GAMMA = 0.5  # to begin with: a slot of n tokens weighs like something between one and n
_OFFSETS = ("bias", "importance_bias", "gamma")
_FROZEN = ("mean", "deviation", "threshold", "margin")  # leaves of a policy that no gradient moves


def solve(run: RunConfig, model: LoadedModel, datas: Datas, windows: int) -> Trained:
    """Fit gates in closed form.

    Args:
        run: the configuration.
        model: that they are for.
        datas: prepared text and mixing weights.
        windows: of training text to fit to.

    Raises:
        UserError: windows without a token that has enough queries after its delay.
    """
    one = {"length": run.data.length, "batch": 1}
    held_out = evaluation_batches(datas[0][0], "validation", **one)
    read = training_batches(datas, **one, seed=order_seed(run, "closed_form"))
    fit = fit_gates(
        model.params,
        run.model,
        _first(read, windows),
        _first(held_out, max(1, windows // 6)),
        delay=max(1, run.gates.delay),
        dtype=run.compute_dtype,
    )
    # One solution for all: hosts may differ in the last digits of theirs.
    gates, r2 = of_first(lambda: jax.device_get((fit.gates, np.concatenate(fit.r2))))
    return _trained(run, gates, r2, model.params)


def begin(
    run: RunConfig, stage: str, model: LoadedModel, datas: Datas, mesh: Mesh
) -> tuple[TrainState | None, CheckpointRef | None, Callable]:
    """Find where a stage goes on.

    Args:
        run: the configuration.
        stage: one of `config.GATED`.
        model: that the gates are for.
        datas: prepared text and mixing weights.
        mesh: devices.

    Returns:
        (the state, if there is one before the first step; the checkpoint of this stage that it is
        of, if any; what takes a step: of `closed_form` there is one, which does it all).
    """
    optimizer, directory = make_optimizer(run), Path(run.output) / run.name

    def solve_all(state, batch, params):
        trained = solve(run, model, datas, _TRIED if run.dry_run else run.gates.windows)
        state = made_on(mesh, lambda x: state_of(x, optimizer, step=1), trained)
        return state, {"r2": trained["r2"].mean()}

    wanted = with_shardings(jax.eval_shape(lambda: state_of(empty(run), optimizer)), mesh)
    names = stage, "closed_form"
    own, before = of_first(lambda: tuple(latest(directory / name) for name in names))
    state = own and restore(own, wanted)
    if stage == "closed_form":
        return state, own, solve_all
    state = state or made_on(
        mesh, lambda x: state_of(x, optimizer), load_params(before, wanted.params)
    )
    counts = count_ids(datas, run.model.vocab_size)
    return state, own, make_distill_step(run, mesh, optimizer, counts)


def state_of(
    trained: Trained, optimizer: optax.GradientTransformation, step: int = 0
) -> TrainState:
    """Begin to distill."""
    return new_state(trained, optimizer.init(_learnt(trained)), step)


def _learnt(trained: Trained) -> Any:
    """What a gradient moves; the policy alone where the model is frozen, as in the first runs."""
    if "model" not in trained:
        return trained["policy"]
    return {name: trained[name] for name in ("policy", "model")}


def _apart(learnt: Any) -> tuple[Gated, Any]:
    """The policy, and what is learnt of the model, None if nothing is."""
    return (learnt["policy"], learnt["model"]) if isinstance(learnt, dict) else (learnt, None)


def empty(run: RunConfig) -> Trained:
    """What is trained, all zeros."""
    L, D, R = run.model.layers, run.model.width, run.model.kv_rows
    shapes = {"mean": (L, D), "deviation": (L, D), "weight": (R, D), "bias": (R,)}
    gates = Gates(**{n: jnp.zeros(s) for n, s in shapes.items()})
    return _trained(run, gates, jnp.zeros(R), init_params(run.model, key_of(run.seed)))


def _policy(run: RunConfig, gates: Gates) -> Gated:
    config = run.gates
    if config.method == DMS.name:
        return DMS(gates, jnp.zeros(()), config.delay, config.temperature)
    more = {"gamma": jnp.full_like(gates.bias, _GAMMA)}
    if config.importance:
        names = "importance_weight", "importance_bias"
        more |= zip(names, map(jnp.zeros_like, (gates.weight, gates.bias)), strict=True)
    settings = dataclasses.replace(run.dmc, temperature=config.temperature, offset=0.0)
    gates = dataclasses.replace(gates, **more)
    return DelayedDMC(gates, jnp.zeros(()), config.delay, settings, config.margin)


def _trained(run: RunConfig, gates: Gates, r2: Any, params: Any) -> Trained:
    # Were the logits normally distributed, this would come to the ratios.
    normal = statistics.NormalDist(sigma=SPREAD)
    thresholds = [normal.inv_cdf(1 / ratio) for ratio in run.gates.ratios]
    trained = {
        "policy": _policy(run, gates),
        "thresholds": jnp.asarray(thresholds),
        "prices": jnp.zeros(len(thresholds)),
        "r2": jnp.asarray(r2, jnp.float32),
    }
    own = adapted.begin(run.gates, params, key_of(run.seed))
    return trained if own is None else trained | {"model": own}


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
    """Adam on what is learnt, without the learning rate; `GatesConfig` has factors on updates."""

    def scale(path, update):
        names = leaf_path(path).split("/")
        if names[0] == "model":
            return run.gates.model_multiplier * update
        name = names[-1]
        if name in _FROZEN:
            return 0.0 * update
        return (run.gates.bias_multiplier if name in _OFFSETS else 1.0) * update

    return optax.chain(
        *clipped_adam(run.optimizer),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)),
    )


def make_distill_step(
    run: RunConfig, mesh: Mesh, optimizer: optax.GradientTransformation, counts: np.ndarray
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Make the jitted step `(state, batch, the model's parameters) -> (state, metrics)`.

    As `make_train_step`: the state is donated, and a resumed run repeats an unbroken one.

    Args:
        run: the whole configuration.
        mesh: devices.
        optimizer: from `make_optimizer`; its state is of the policy alone.
        counts: how often every id is in the text, from `count_ids`.
    """
    ratios = jnp.asarray(run.gates.ratios)
    stage_key = jax.random.fold_in(key_of(run.seed), STAGES.index("distill"))

    def train_step(state: TrainState, batch: Batch, model_params: Any):
        drawn, noise = jax.random.split(jax.random.fold_in(stage_key, state.step))
        which = jax.random.randint(drawn, (), 0, ratios.size)
        wanted, price = 1.0 - 1.0 / ratios[which], state.params["prices"][which]
        threshold = state.params["thresholds"][which]
        policy = dataclasses.replace(state.params["policy"], threshold=threshold)
        learnt = _learnt(state.params | {"policy": policy})

        def loss(learnt, part, number):
            policy, own = _apart(learnt)
            models = adapted.adapt(run.gates, model_params, own), model_params
            drawn_from = noise_of(run, noise, number, batch)
            metrics = _distill(run, mesh, models, policy, part, batch, drawn_from, counts)
            weighed = [
                getattr(run.gates, _LOSSES[n]) * x for n, x in metrics.items() if n in _LOSSES
            ]
            return sum(weighed) - price * metrics["dropped"], metrics

        gradient = functools.partial(jax.grad(loss, has_aux=True), learnt)
        grads, metrics = sum_over_parts(gradient, batch, run.accumulation)
        rate = rate_at(state.step, run.distill)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, learnt)
        slope = jnp.maximum(metrics.pop("slope"), 1e-3)
        excess = metrics.pop("dropped") - wanted
        old = _learnt(state.params)
        policy, own = _apart(jax.tree.map(lambda p, u: p - rate * u, old, updates))
        params = state.params | ({} if own is None else {"model": own})
        params |= {
            "policy": policy,
            "thresholds": state.params["thresholds"].at[which].add(_TOWARDS * excess / slope),
            "prices": state.params["prices"]
            .at[which]
            .set(jnp.maximum(price - _RENEWED * _apart(grads)[0].threshold / slope, 0.0)),
        }
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": optax.tree.norm(grads),
            "drawn_ratio": ratios[which],
        }
        # No spikes: the losses of several ratios are not alike.
        state, metrics = after_step(state, params, optimizer_state, metrics, spike=0.0)
        return jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    return jax.jit(train_step, donate_argnums=0)


def count_ids(datas: Datas, vocab_size: int) -> np.ndarray:
    """Count how often every id is in training text, float32 [V]; of a large text in a part."""
    parts = (data.tokens["train"][:_COUNTED] for data, _ in datas)
    return sum(np.bincount(part, minlength=vocab_size) for part in parts).astype(np.float32)


def _among(prediction: Prediction, ids: Array) -> Prediction:
    axis = 0 if prediction.tied else 1
    return dataclasses.replace(prediction, head=jnp.take(prediction.head, ids, axis=axis))


def _distill(run, mesh, models, policy, part, batch, noise, counts) -> Metrics:
    """Losses that have a weight and drops of a part of a batch, which add up over the parts.

    `models` are the parameters of the one that learns and of the one that teaches.

    `slope` is how fast the drops grow as the threshold falls.
    """
    attention = attention_for(run, mesh)
    where = part["positions"], part["segment_ids"]

    def predict(params, policy, **drawn):
        attend = attend_whole(policy, run.model, *where, **drawn, attention=attention)
        return apply_model(run, run.model, mesh, params, part["tokens"], attend)

    output = predict(models[0], policy, noise_key=noise.key, noise_part=noise.part)
    learns = output.prediction
    dense = predict(models[1], Dense()).prediction if run.gates.distillation else None
    if not run.gates.next_token:  # the likely ids tell the divergence well enough
        most = min(run.model.vocab_size, run.gates.vocabulary + batch["tokens"].size)
        ids = jax.lax.top_k(jnp.asarray(counts).at[batch["tokens"]].set(jnp.inf), most)[1]
        learns, dense = (_among(each, ids) for each in (learns, dense))
    targets = part["targets"] if run.gates.next_token else jnp.zeros_like(part["targets"])
    losses = dict(zip(_LOSSES, token_losses(learns, targets, dense), strict=True))
    real, all_real = (x["segment_ids"] > 0 for x in (part, batch))
    rows = run.model.kv_rows * jnp.maximum(all_real.sum(), 1)
    tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)

    def mean(x):
        return sum(jnp.einsum("LBTK,BT->", y, real.astype(jnp.float32)) for y in x) / rows

    appended = [record.appends.mean(axis=(1, 2, 3)) for record in output.records]
    return {
        **{
            name: jnp.sum(part["loss_mask"] * loss) / tokens
            for name, loss in losses.items()
            if getattr(run.gates, _LOSSES[name])
        },
        "dropped": mean(r.decisions for r in output.records),
        "slope": mean(r.decisions * (1.0 - r.decisions) for r in output.records),
        "merged": (1.0 - jnp.concatenate(appended)) / run.accumulation,  # [L]
    }


def measure(
    run: RunConfig, trained: Trained, model: LoadedModel, datas: Datas, mesh: Mesh, tokens: int
) -> tuple[StoredGates, Evaluation]:
    """Measure gates on validation text: a table of thresholds, and all figures at one ratio.

    Args:
        run: the configuration.
        trained: from `solve` or a step.
        model: that they are for.
        datas: prepared text; of each the first `eval_windows` windows of validation are read.
        mesh: devices.
        tokens: that they were distilled on.

    Returns:
        (what a file of gates holds; what they do to the first text at `compression.ratio`, or the
        measured ratio nearest to it).
    """
    options = evaluation_options(run, mesh)
    params = adapted.adapt(run.gates, model.params, trained.get("model"))

    def on(data, policy, params=params):
        common = {"limit": run.eval_windows, "count_bytes": data is datas[0][0], **options}
        return evaluate(params, run.model, data, "validation", policy=policy, **common)

    texts = [data for data, _ in datas]
    dense = [on(data, Dense(), model.params) for data in texts]
    knots = np.asarray(trained["thresholds"]).tolist()
    table: list[Measured] = []
    for threshold in (knots[0] + 9 * SPREAD, knots[0] + SPREAD / 2, *knots):
        policy = dataclasses.replace(trained["policy"], threshold=threshold)
        found = [on(data, policy) for data in texts]
        ratio = statistics.harmonic_mean([each.ratio for each in found])
        rise = np.mean([each.loss - before.loss for each, before in zip(found, dense, strict=True)])
        if not table or ratio > table[-1].ratio:
            figures = {"perplexity_percent": 100 * math.expm1(rise)}
            table.append(Measured(threshold, ratio, figures))
    about = {
        "text": [Path(data.manifest["source"]).name for data in texts],
        "distilled_tokens": tokens,
        "measured_tokens": sum(each.tokens for each in dense),
        "length": run.data.length,
        "seed": run.seed,
        "r2": round(float(np.mean(trained["r2"])), 3),
        "machine": machine(" ".join(["python -m dmc_jax.train", *sys.argv[1:]])),
    }
    base = model_hash(params, run.model)
    policy = dataclasses.replace(trained["policy"], threshold=table[0].threshold)
    stored = StoredGates(jax.device_get(policy), base, tuple(table), about)
    ratio = min(max(run.compression.ratio, table[0].ratio), table[-1].ratio)
    return stored, on(texts[0], stored.at(ratio))


def save_model(run: RunConfig, trained: Trained, model: LoadedModel, data: PreparedData) -> None:
    """Write the model that gates were trained together with, where it is not the one that was.

    Args:
        run: the configuration; it goes to `output/name/model`, a run directory of its own.
        trained: at the end of distillation.
        model: as it was.
        data: prepared text with its tokenizer.

    Raises:
        OSError: it cannot be written.
    """
    if run.gates.model == "frozen":
        return
    folder, steps = Path(run.output, run.name, "model"), run.distill.steps
    params = adapted.adapt(run.gates, model.params, trained["model"])
    about = dataclasses.replace(describe(run, "distill", steps, data), stage="pretrain")
    there = of_first(lambda: latest(folder))  # a run ended after this, and before all was measured
    with open_for_saving(folder, "pretrain", 1, resumed_step=there and there.step) as saver:
        saver.save(steps, {"params": params}, {}, about)


def _first(batches: Iterable, count: int) -> list[dict[str, np.ndarray]]:
    return [{name: batch[name] for name in READ} for batch in itertools.islice(batches, count)]
