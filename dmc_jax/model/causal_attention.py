"""What computes causal attention: `core.attention`, or a kernel where one can run."""

import functools

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.errors import UserError
from dmc_jax.model.sharding import batch_axes
from pallas_kernels.causal_attention import api as kernels
from pallas_kernels.quantisation import rounded


def choose_attention(
    implementation: str = "auto", *, block: int = 256, mesh: Mesh | AbstractMesh | None = None
) -> CausalAttention:
    """Pick who attends; equal arguments give the same function, so that jit knows it again.

    Args:
        implementation: "xla", the one of `core.attention`; "triton", the kernels of
            `pallas_kernels.causal_attention`; "auto", the kernels where they can run.
        block: tokens per block of "xla".
        mesh: devices that share the work, with batches over its `batch_axes` and heads over
            `tensor`. Without it "auto" takes the kernels on one device only: XLA does not know how
            to split them.

    Raises:
        UserError: the kernels are asked for and cannot run here.
    """
    if implementation == "triton" and (reason := kernels.unavailable("triton")) is not None:
        raise UserError(f"attention is 'triton', which cannot run here: {reason}; choose auto")
    if implementation == "auto":
        alone = mesh is None and jax.device_count() > 1
        implementation = kernels.XLA if alone else kernels.choose(None)
    if implementation == kernels.XLA:
        return _in_blocks(block)
    attend = _by_kernels(implementation)
    return attend if mesh is None or mesh.size == 1 else _split_over(mesh, attend)


def evaluation_attention(
    trained_with: str, block: int, mesh: Mesh | AbstractMesh | None = None
) -> CausalAttention:
    """Pick who attends on a machine that may not be that of training.

    Args:
        trained_with: the implementation that training was told to take: its "triton" is "auto"
            here, which takes what can run.
        block: tokens per block of "xla".
        mesh: as for `choose_attention`.
    """
    return choose_attention("xla" if trained_with == "xla" else "auto", block=block, mesh=mesh)


@functools.cache
def over_int8(attention: CausalAttention) -> CausalAttention:
    """Let attention see keys and values as pages of int8 would hold them.

    What a policy gives it as keys are the slots, rotated, as they were after each token: so this is
    decoding over such pages, for every policy but those that attend token by token.

    Args:
        attention: what computes it.
    """

    def attend(q, k, v, key_bias=None, **how):
        return attention(q, rounded(k, k.dtype), rounded(v, v.dtype), key_bias, **how)

    return attend


@functools.cache
def _in_blocks(block: int) -> CausalAttention:
    return functools.partial(causal_attention, block=block)


@functools.cache
def _by_kernels(implementation: str) -> CausalAttention:
    return functools.partial(kernels.causal_attention, implementation=implementation)


@functools.cache
def _split_over(mesh: Mesh | AbstractMesh, attention: CausalAttention) -> CausalAttention:
    """The same attention, every device with its own sequences and heads."""

    def attend(q, k, v, key_bias=None, *, segment_ids=None, spared_bias=None, **how):
        # As in `model.sharding`: heads that do not divide are everywhere.
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        batch = batch_axes(mesh)
        given = {"key_bias": key_bias, "spared_bias": spared_bias, "segment_ids": segment_ids}
        of_heads, of_tokens = PartitionSpec(batch, None, heads), PartitionSpec(batch)
        specs = {name: of_tokens if name == "segment_ids" else of_heads for name in given}
        given = {name: x for name, x in given.items() if x is not None}
        split = jax.shard_map(
            lambda q, k, v, given: attention(q, k, v, **given, **how),
            mesh=mesh,
            in_specs=(of_heads, of_heads, of_heads, {name: specs[name] for name in given}),
            out_specs=of_heads,
            axis_names={*batch, "tensor"},
            check_vma=False,  # the kernel's outputs do not say over which axes they vary
        )
        return split(q, k, v, given)

    return attend
