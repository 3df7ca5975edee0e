"""What is done when a stage ends, and what its checkpoints say."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.config import GATED, MERGING, RunConfig
from dmc_jax.core.schedules import decision_channel_scale
from dmc_jax.data.prepared import PreparedData
from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.evaluation.perplexity import calibrate_threshold, evaluate
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.policies.choice import Trained
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.training.optimizer import zero_decision_rows
from dmc_jax.training.state import TrainState


def finish_stage(stage: str, state: TrainState) -> TrainState:
    """What happens to the state after the last step: zero_out empties the decision channel."""
    if stage != "zero_out":
        return state
    return dataclasses.replace(
        state,
        params=zero_decision_rows(state.params),
        optimizer=zero_decision_rows(state.optimizer),
    )


def describe(run: RunConfig, stage: str, step: int, data: PreparedData) -> Metadata:
    """Metadata of any checkpoint: enough to load and run it without its config file."""
    return Metadata(
        stage=stage,
        step=step,
        model=run.model,
        # After zero_out no head merges yet, but the decision channel has left attention.
        policy=_policy(run, stage),
        compute_dtype=run.compute_dtype,
        data=str(data.path.absolute()),
        tokenizer=str(data.tokenizer_path.absolute()),
        tokenizer_sha256=data.manifest["tokenizer_sha256"],
        special_tokens=load_tokenizer(data.tokenizer_path).special,
        run=run,
    )


def assess(
    run: RunConfig,
    stage: str,
    params: Any,
    data: PreparedData,
    mesh: Mesh,
    *,
    within: int | None = None,
) -> dict:
    """Measurements at the end of a stage: calibrated threshold and validation figures.

    Args:
        run, stage, params, data, mesh: of the stage.
        within: steps that were taken, where it goes on: then nothing is calibrated, and zero_out
            attends with what is left of its channel.

    Returns:
        Fields `policy` and `validation` of `Metadata`.
    """
    policy = _policy(run, stage)
    if stage == "zero_out" and within is not None:
        policy = Dense(decision_channel_scale(within, run.zero_out.steps))
    common = evaluation_options(run, mesh)
    if within is None and stage in MERGING and run.compression.calibration_windows:
        threshold = calibrate_threshold(
            params,
            run.model,
            data,
            policy=policy,
            ratio=run.compression.ratio,
            windows=run.compression.calibration_windows,
            **common,
        )
        policy = dataclasses.replace(policy, threshold=threshold)
    measured = evaluate(
        params,
        run.model,
        data,
        "validation",
        policy=policy,
        limit=run.eval_windows,
        **common,
    )
    return {"policy": policy, "validation": dataclasses.asdict(measured)}


def evaluation_options(run: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Say how to evaluate while training: devices share the windows as there, and no more at once.

    Args:
        run: the configuration.
        mesh: over which the parameters are spread.

    Returns:
        Arguments of `evaluate` and `calibrate_threshold`.
    """
    return {
        "length": run.data.length,
        "batch": min(run.data.batch // run.accumulation, run.eval_windows),
        "dtype": run.compute_dtype,
        "attention": choose_attention(run.attention, block=run.attention_block, mesh=mesh),
        "mesh": mesh,
    }


def _policy(run: RunConfig, stage: str) -> Trained:
    """Say what a stage's models run with."""
    return Dense() if stage in ("pretrain", *GATED) else DMC(run.dmc)


def finite(values: Any) -> bool:
    """Whether every number of a fetched pytree is finite."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))
