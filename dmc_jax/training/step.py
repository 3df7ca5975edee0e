"""One training step: batch in, new state and metrics out. Pure, jitted once per stage."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dmc_jax.config import STAGES, ModelConfig, RunConfig
from dmc_jax.core.attention import CausalAttention
from dmc_jax.core.losses import compression_loss, distillation, token_cross_entropy
from dmc_jax.core.schedules import compression_target, decision_channel_scale, learning_rate
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.model.llama import Attend, Llama
from dmc_jax.model.sharding import shardings
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole, decision_means
from dmc_jax.training.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    run: RunConfig,
    stage: str,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    teacher: ModelConfig | None = None,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Make the jitted step of a stage, `(state, batch, teacher_params) -> (state, metrics)`.

    The state is donated. Everything that changes with time is a function of `state.step`; the noise
    key comes from (seed, stage, step) and, inside the model, the layer. So a resumed run repeats an
    unbroken one bit for bit.

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
    stage_key = jax.random.fold_in(jax.random.key(run.seed), STAGES.index(stage))

    def train_step(state: TrainState, batch: Batch, teacher_params: Any):
        key = jax.random.fold_in(stage_key, state.step)
        grads, metrics = _accumulated_gradient(
            lambda params, part, key, tokens: _loss(
                run, stage, mesh, teacher, params, teacher_params, part, state.step, key, tokens
            ),
            state.params,
            batch,
            key,
            run.accumulation,
        )
        rate = learning_rate(
            state.step,
            steps=schedule.steps,
            peak=schedule.learning_rate,
            final=schedule.final_learning_rate,
            warmup=schedule.warmup,
            shape=schedule.shape,
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics |= {"learning_rate": rate, "gradient_norm": optax.tree.norm(grads)}
        state = TrainState(state.step + 1, params, optimizer_state)
        return jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    return jax.jit(train_step, donate_argnums=0)


def _accumulated_gradient(loss: Callable, params: Any, batch: Batch, key: Array, parts: int):
    """Gradient and metrics of a batch in `parts` pieces, equal to those of the whole.

    Every piece is weighed by the tokens of the whole batch, not by its own.
    """
    tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key, tokens)
    # Window b goes to piece b % parts, so that every device keeps its share of each piece.
    pieces = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))

    def add(total, piece):
        return jax.tree.map(jnp.add, total, gradient(params, *piece, tokens)), None

    first = jax.tree.map(lambda x: x[0], (pieces, keys))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, *first, tokens)
    )
    return jax.lax.scan(add, zeros, (pieces, keys))[0]


def _loss(
    run: RunConfig,
    stage: str,
    mesh: Mesh,
    teacher: ModelConfig | None,
    params: Any,
    teacher_params: Any,
    batch: Batch,
    step: Array,
    key: Array,
    tokens: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """Loss of (a piece of) a batch; metrics add up over the pieces to the batch's."""
    output = _forward(
        run,
        run.model,
        mesh,
        params,
        batch["tokens"],
        attention_of(run, stage, mesh, batch, step, key),
    )
    mask = batch["loss_mask"]
    loss = jnp.sum(mask * token_cross_entropy(output.logits, batch["targets"])) / tokens
    metrics = {"loss": loss}
    if teacher is not None:
        where = batch["positions"], batch["segment_ids"]
        attend = attend_whole(Dense(), teacher, *where, attention=_attention(run, mesh))
        wanted = _forward(run, teacher, mesh, teacher_params, batch["tokens"], attend).logits
        divergence = jnp.sum(mask * distillation(output.logits, jax.lax.stop_gradient(wanted)))
        metrics["distillation"] = divergence / tokens
        loss += run.compression.distillation * metrics["distillation"]
    if stage in ("retrofit", "finetune"):
        at = step if stage == "retrofit" else run.stage(stage).steps
        target, prior = compression_target(at, run.stage(stage).steps, run.compression.ratio)
        hinge = compression_loss(decision_means(output), prior, run.compression.per_layer)
        metrics["compression_loss"] = hinge / run.accumulation
        metrics["target_ratio"] = target / run.accumulation
        appended = [record.appends.mean(axis=(1, 2, 3)) for record in output.records]
        metrics["merged"] = (1.0 - jnp.concatenate(appended)) / run.accumulation  # [L]
        loss += run.compression.weight * metrics["compression_loss"]
    return loss, metrics


def attention_of(
    run: RunConfig, stage: str, mesh: Mesh, batch: Batch, step: Array, key: Array
) -> Attend:
    """The attention function that a stage trains with."""
    where = batch["positions"], batch["segment_ids"]
    policy, noise_key = Dense(), None
    if stage == "zero_out":
        policy = Dense(decision_channel_scale(step, run.zero_out.steps))
    elif stage in ("retrofit", "finetune"):
        policy, noise_key = DMC(run.dmc), key
    return attend_whole(
        policy, run.model, *where, noise_key=noise_key, attention=_attention(run, mesh)
    )


def _attention(run: RunConfig, mesh: Mesh) -> CausalAttention:
    return choose_attention(run.attention, block=run.attention_block, mesh=mesh)


def _forward(run: RunConfig, config: ModelConfig, mesh: Mesh, params, tokens, attend: Attend):
    model = Llama(
        config,
        dtype=jnp.dtype(run.compute_dtype),
        remat=run.remat,
        sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
    )
    return model.apply({"params": params}, tokens, attend=attend)
