"""One training step: batch in, new state and metrics out. Pure, jitted once per stage."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dmc_jax.config import MERGING, STAGES, ModelConfig, RunConfig, StageConfig
from dmc_jax.core.attention import CausalAttention
from dmc_jax.core.losses import compression_loss, token_losses
from dmc_jax.core.schedules import compression_target, decision_channel_scale, learning_rate
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.model.llama import Attend, Llama
from dmc_jax.model.sharding import inner, own_of_data, residual_sharding, shardings
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole, decision_means
from dmc_jax.training.state import TrainState, after_step, key_of

Batch = dict[str, Array]
Metrics = dict[str, Array]


class Noise(NamedTuple):
    """What the noise of (a part of) a batch is drawn from; see `attend_whole`."""

    key: Array  # or one of each window
    part: tuple[Int[Array, ""] | int, int]


class Whole(NamedTuple):
    """What the loss of a part needs to know of its batch."""

    step: Array
    tokens: Float[Array, ""]  # that are predicted in it, by which every part is weighed
    parts: int
    # Fraction of merges in it by layer, where a hinge per layer needs that; None: it has no parts.
    merges: Float[Array, " L"] | None


def make_train_step(
    run: RunConfig,
    stage: str,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    teacher: ModelConfig | None = None,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Make the jitted step of a stage, `(state, batch, teacher_params) -> (state, metrics)`.

    The state is donated. Everything that changes with time is a function of `state.step`; the noise
    key comes from (seed, stage, step), the window's place in the batch and, inside the model, the
    layer. So a resumed run repeats an unbroken one bit for bit.

    Args:
        run: the whole configuration.
        stage: one of `config.STAGES`.
        mesh: devices.
        optimizer: from `make_optimizer`.
        teacher: sizes of the distillation teacher, None where there is none; its parameters are the
            step's third argument (None where there is none).

    Returns:
        The step. Batches are dicts as `data.loader.windows` describes; metrics are scalars, and
        `merged` [L], the fraction of merged tokens by layer, in the stages that merge.
    """
    schedule = run.stage(stage)
    parts = run.accumulation
    pieces = parts * _groups(run, mesh)
    seed = run.seed if run.draws > 1 else run.seed % 2**32
    stage_key = jax.random.fold_in(key_of(seed), STAGES.index(stage))
    over_parts = functools.partial(_over_parts, run, mesh)

    def train_step(state: TrainState, batch: Batch, teacher_params: Any):
        key = jax.random.fold_in(stage_key, state.step)
        tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)

        def fractions(part, noise, params, step):
            attend = attention_of(run, stage, mesh, part, step, noise)
            output = apply_model(run, run.model, mesh, params, part["tokens"], attend)
            return decision_means(output).mean(axis=1) / pieces

        merges = None
        if stage in MERGING and run.compression.per_layer and parts > 1:
            merges = over_parts(fractions, batch, key, state.params, state.step)

        def gradient(part, noise, params, teacher_params, step, tokens, merges):
            taught = None if teacher is None else (teacher, teacher_params)
            whole = Whole(step, tokens, pieces, merges)
            loss = functools.partial(_loss, run, stage, mesh)
            return jax.grad(loss, has_aux=True)(params, part, noise, whole, taught)

        alike = state.params, teacher_params, state.step, tokens, merges
        grads, metrics = over_parts(gradient, batch, key, *alike)
        rate = rate_at(state.step, schedule)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics |= {"learning_rate": rate, "gradient_norm": optax.tree.norm(grads)}
        state, metrics = after_step(state, params, optimizer_state, metrics, run.guard.spike)
        return jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    return jax.jit(train_step, donate_argnums=0)


def _groups(run: RunConfig, mesh: Mesh) -> int:
    """In how many groups devices add up parts of their own, to meet once a step: along `data`."""
    return mesh.shape["data"] if run.accumulation > 1 and run.draws > 2 else 1


def _over_parts(
    run: RunConfig, mesh: Mesh, function: Callable, batch: Batch, key: Array, *alike: Any
) -> Any:
    """Add up `function(part, its noise, *alike)` over the parts of a batch.

    Args:
        run, mesh: of the step.
        function: traced where its part lies; what else it is to know of arrays is in `alike`.
        batch: the whole.
        key: of the step's noise.
        alike: what all parts are given.
    """
    groups = _groups(run, mesh)

    def of_own(own, key, *alike):
        first = jax.lax.axis_index("data") * own["tokens"].shape[0] if groups > 1 else 0

        def of_part(part, number):
            if run.draws == 1 and run.accumulation > 1:
                noise = Noise(jax.random.fold_in(key, number), (0, 1))
            else:
                noise = noise_of(run, key, number, own, first)
            return function(part, noise, *alike)

        return sum_over_parts(of_part, own, run.accumulation)

    return (own_of_data(of_own, mesh) if groups > 1 else of_own)(batch, key, *alike)


def noise_of(
    run: RunConfig,
    key: Array,
    number: Int[Array, ""] | int,
    batch: Batch,
    first: Int[Array, ""] | int = 0,
) -> Noise:
    """Say what the noise of part `number` of a batch is drawn from: windows have keys of their own.

    So it depends neither on the parts nor on the devices that a batch is divided over, and a part
    draws its own alone.

    Args:
        run: the configuration; where it began with fewer `draws`, each part draws that of all.
        key: of the step.
        number: of the part, whose windows are every `run.accumulation`-th from there on.
        batch: the whole, or windows of it that follow each other.
        first: the number in the whole of the first of these.
    """
    if run.draws < 3:
        return Noise(key, (number, run.accumulation))
    windows = jnp.arange(0, batch["tokens"].shape[0], run.accumulation) + first + number
    return Noise(jax.vmap(jax.random.fold_in, (None, 0))(key, windows), (0, 1))


def rate_at(step: Array, stage: StageConfig) -> Float[Array, ""]:
    """Look up the learning rate in a stage's schedule."""
    return learning_rate(
        step,
        steps=stage.steps,
        peak=stage.learning_rate,
        final=stage.final_learning_rate,
        warmup=stage.warmup,
        shape=stage.shape,
    )


def sum_over_parts(function: Callable, batch: Batch, parts: int) -> Any:
    """Add up `function(part, its number)` over the parts of a batch, one at a time."""
    if parts == 1:
        return function(batch, 0)
    # Window b goes to part b % parts, so that every device keeps its share of each.
    divided = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
    numbered = divided, jnp.arange(parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    first = jax.tree.map(lambda x: x[0], numbered)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *first))
    return jax.lax.scan(add, zeros, numbered)[0]


def _loss(
    run: RunConfig,
    stage: str,
    mesh: Mesh,
    params: Any,
    batch: Batch,
    noise: Noise,
    whole: Whole,
    taught: tuple[ModelConfig, Any] | None,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss of (a part of) a batch; loss, gradient and metrics add up over the parts.

    Args:
        run, stage, mesh, params, batch, noise: of the part.
        whole: what it is a part of.
        taught: sizes and parameters of the teacher of distillation.
    """
    attend = attention_of(run, stage, mesh, batch, whole.step, noise)
    output = apply_model(run, run.model, mesh, params, batch["tokens"], attend)
    teaches = None
    if taught is not None:
        teacher, teacher_params = taught
        where = batch["positions"], batch["segment_ids"]
        attend = attend_whole(Dense(), teacher, *where, attention=attention_for(run, mesh))
        teaches = apply_model(
            run, teacher, mesh, teacher_params, batch["tokens"], attend
        ).prediction
    nats, divergence = token_losses(output.prediction, batch["targets"], teaches)
    mask = batch["loss_mask"]
    loss = jnp.sum(mask * nats) / whole.tokens
    metrics = {"loss": loss}
    if taught is not None:
        metrics["distillation"] = jnp.sum(mask * divergence) / whole.tokens
        loss += run.compression.distillation * metrics["distillation"]
    if stage in MERGING:
        at = whole.step if stage == "retrofit" else run.stage(stage).steps
        target, prior = compression_target(at, run.stage(stage).steps, run.compression.ratio)
        means = decision_means(output)
        hinge = compression_loss(means, prior, run.compression.per_layer)
        if whole.merges is not None:
            # A hinge is open by the batch's mean, not by the part's; open, it is linear.
            hinge = jnp.mean(jnp.where(whole.merges < prior, prior - means.mean(axis=1), 0.0))
        metrics["compression_loss"] = hinge / whole.parts
        metrics["target_ratio"] = target / whole.parts
        appended = [record.appends.mean(axis=(1, 2, 3)) for record in output.records]
        metrics["merged"] = (1.0 - jnp.concatenate(appended)) / whole.parts  # [L]
        loss += run.compression.weight * metrics["compression_loss"]
    return loss, metrics


def attention_of(
    run: RunConfig, stage: str, mesh: Mesh, batch: Batch, step: Array, noise: Noise
) -> Attend:
    """The attention function that a stage trains with."""
    where = batch["positions"], batch["segment_ids"]
    policy, drawn = Dense(), {}
    if stage == "zero_out":
        policy = Dense(decision_channel_scale(step, run.zero_out.steps))
    elif stage in MERGING:
        policy, drawn = DMC(run.dmc), {"noise_key": noise.key, "noise_part": noise.part}
    return attend_whole(policy, run.model, *where, **drawn, attention=attention_for(run, mesh))


def attention_for(run: RunConfig, mesh: Mesh) -> CausalAttention:
    """Choose what computes a run's attention, with operands as those of all products."""
    attention = choose_attention(run.attention, block=run.attention_block, mesh=inner(mesh))
    if not run.products:
        return attention

    def narrowed(q, k, v, *biases, **how):
        return attention(*(x.astype(run.products) for x in (q, k, v)), *biases, **how)

    return narrowed


def apply_model(run: RunConfig, config: ModelConfig, mesh: Mesh, params, tokens, attend: Attend):
    """Run a model as a run trains it."""
    model = Llama(
        config,
        dtype=jnp.dtype(run.compute_dtype),
        remat=run.remat,
        sharding=residual_sharding(config, inner(mesh)),
        products=jnp.dtype(run.products) if run.products else None,
    )
    return model.apply({"params": params}, tokens, attend=attend)
