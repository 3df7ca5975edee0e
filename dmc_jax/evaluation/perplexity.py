"""Loss, perplexity, bits per byte and achieved compression ratio on held-out windows."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int32

from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.core.losses import token_losses
from dmc_jax.data.loader import evaluation_batches
from dmc_jax.data.prepared import PreparedData
from dmc_jax.data.tokenizer import load_tokenizer, token_bytes
from dmc_jax.errors import UserError
from dmc_jax.model.llama import Llama
from dmc_jax.model.sharding import batch_sharding, replicated, spread
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Policy, attend_whole, slots_taken

_TOKENS_AT_A_TIME = 2**22  # of a file that may be larger than memory

_READ = ("tokens", "targets", "positions", "segment_ids", "loss_mask")  # of a window, by the model


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured on one split; a ratio is tokens per cache slot, 1 for a dense model."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float
    tokens: int  # predicted
    windows: int
    ratio: float  # all tokens over all slots
    ratio_by_layer: tuple[float, ...]
    ratio_by_head: tuple[tuple[float, ...], ...]  # [layer][KV head]

    def cache_bytes(self, config: ModelConfig, tokens: int, bytes_per_number: int = 2) -> float:
        """Count the bytes of keys and values that `tokens` tokens take at the measured ratio."""
        return 2 * config.kv_rows * config.head_dim * bytes_per_number * tokens / self.ratio


def evaluate(
    params: Any,
    config: ModelConfig,
    data: PreparedData,
    split: str,
    *,
    policy: Policy,
    length: int,
    batch: int,
    limit: int | None = None,
    dtype: str = "float32",
    attention: CausalAttention = causal_attention,
    mesh: Mesh | None = None,
    count_bytes: bool = True,
) -> Evaluation:
    """Run a model over a split with the decisions it makes at inference.

    Args:
        params: of the model.
        config: its sizes.
        data: from `open_data`.
        split: "train", "validation" or "test".
        policy: what its rows keep.
        length: tokens per window; a window's first token always opens a slot.
        batch: windows at a time, by which memory goes and no figure; over a mesh rounded up to as
            many for each device.
        limit: windows to read at most.
        dtype: of the forward pass.
        attention: what computes the attention itself; see `model.causal_attention`.
        mesh: devices that share the windows, over which `params` are spread as in training; None:
            one device does it all.
        count_bytes: whether bits per byte are wanted, for which all tokens of the split are read;
            NaN without.

    Raises:
        UserError: the data has ids that the model does not have.
    """
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{data.path} was tokenized with {data.vocab_size} ids, the model has "
            f"{config.vocab_size}: use data prepared with the model's tokenizer"
        )
    batch += -batch % (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"])
    batches = evaluation_batches(data, split, length=length, batch=batch, limit=limit)
    bytes_of = token_bytes(load_tokenizer(data.tokenizer_path))
    measure = functools.partial(_evaluate_batch, config, dtype, attention, mesh)
    nats = tokens = real_bytes = positions = windows = 0.0
    slots = None
    for numpy_batch in batches:
        on_devices = _place({name: numpy_batch[name] for name in _READ}, mesh)
        batch_nats, batch_slots = jax.device_get(measure(params, on_devices, policy))
        mask = numpy_batch["loss_mask"]
        nats += float(batch_nats)
        tokens += float(mask.sum())
        real_bytes += float((mask * bytes_of[numpy_batch["targets"]]).sum())
        positions += float((numpy_batch["segment_ids"] > 0).sum())
        windows += int((numpy_batch["window"] >= 0).sum())
        slots = batch_slots if slots is None else jax.tree.map(np.add, slots, batch_slots)
    slots = [layer for stack in slots for layer in np.asarray(stack)]
    real_bytes *= text_bytes_per_piece_byte(data, split, bytes_of) if count_bytes else math.nan
    return Evaluation(
        loss=nats / tokens,
        perplexity=_exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / real_bytes,
        tokens=int(tokens),
        windows=int(windows),
        ratio=float(positions * sum(len(s) for s in slots) / sum(s.sum() for s in slots)),
        ratio_by_layer=tuple(float(positions * len(s) / s.sum()) for s in slots),
        ratio_by_head=tuple(tuple(float(positions / slot) for slot in s) for s in slots),
    )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # beyond 709 nats
        return math.inf


def text_bytes_per_piece_byte(
    data: PreparedData, split: str, bytes_of: Int32[np.ndarray, " V"]
) -> float:
    """Measure how many bytes of a split's text stand behind each byte of its tokens' pieces.

    That is 1 where the tokens give back the text. A tokenizer that normalises (folds case, drops
    indentation, knows no byte) has pieces of another length than the text that they stand for.

    Args:
        data: from `open_data`.
        split: of it.
        bytes_of: of the pieces, by id.
    """
    tokens = data.tokens[split]
    parts = range(0, len(tokens), _TOKENS_AT_A_TIME)
    pieces = sum(int(bytes_of[tokens[at : at + _TOKENS_AT_A_TIME]].sum()) for at in parts)
    return data.manifest["splits"][split]["bytes"] / pieces


def _place(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Give every device its windows; every host has read them all."""
    if mesh is None:
        return batch
    sharding = batch_sharding(mesh)
    return {name: spread(x, sharding) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluate_batch(config, dtype, attention, mesh, params, batch, policy):
    """Sum the loss in nats, and count slots per KV head, one [layers, K] array per stack."""
    where = batch["positions"], batch["segment_ids"]
    attend = attend_whole(policy, config, *where, attention=attention)
    sharding = None if mesh is None else batch_sharding(mesh)
    output = Llama(config, dtype=jnp.dtype(dtype), sharding=sharding).apply(
        {"params": params}, batch["tokens"], attend=attend
    )
    nats = jnp.sum(batch["loss_mask"] * token_losses(output.prediction, batch["targets"])[0])
    sums = nats, slots_taken(output, (batch["segment_ids"] > 0).astype(jnp.float32))
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, replicated(mesh))


def calibrate_threshold(
    params: Any,
    config: ModelConfig,
    data: PreparedData,
    *,
    policy: DMC,
    ratio: float,
    windows: int,
    length: int,
    batch: int,
    dtype: str = "float32",
    attention: CausalAttention = causal_attention,
    mesh: Mesh | None = None,
    steps: int = 14,
) -> float:
    """Find the threshold with which a model compresses by `ratio` on training text.

    Decisions of a layer depend on those below it, so the whole model is run at each of `steps`
    bisections. A higher threshold merges less.

    Args:
        params, config, data, length, batch, dtype, attention, mesh: as in `evaluate`.
        policy: with any threshold.
        ratio: wanted tokens per slot.
        windows: training windows to measure on.
        steps: bisections.

    Returns:
        The threshold, to within the last bisection, at which the ratio still is at least `ratio`;
        0, with a warning, where even merging nearly everything falls short of it.
    """
    bracket = policy.settings.offset + 10.0  # beyond it sigmoid is 0 or 1 to four digits
    low, high = -bracket, bracket  # low merges more
    for _ in range(steps):
        middle = 0.5 * (low + high)
        measured = evaluate(
            params,
            config,
            data,
            "train",
            policy=dataclasses.replace(policy, threshold=middle),
            length=length,
            batch=batch,
            limit=windows,
            dtype=dtype,
            attention=attention,
            mesh=mesh,
            count_bytes=False,
        ).ratio
        low, high = (middle, high) if measured >= ratio else (low, middle)
    if low == -bracket:
        logging.warning("no threshold reaches a ratio of %g (last measured: %g)", ratio, measured)
        return 0.0
    return low
