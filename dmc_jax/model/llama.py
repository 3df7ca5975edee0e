"""A Llama in Flax Linen whose attention is an argument.

`Llama.apply(variables, tokens, attend=...)`: the same parameters serve every policy in training and
evaluation (`policies.policy.attend_whole`), and decoding from a cache. Layers of equal shape are a
stack, which is scanned.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig, RunConfig
from dmc_jax.core.losses import Prediction
from dmc_jax.core.projection import project

# Matrices that multiply the same activations, which are one, side by side, in unstacked layers.
_SIDE_BY_SIDE = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

# Llama's initialisation: normal, the projections into the residual stream scaled down by depth.
_INIT_STD = RunConfig.initializer_range
_PRODUCT = "product"


@runtime_checkable
class Attend(Protocol):
    """An attention function: (q, k, v, x, layer, state) -> (out, state, record).

    q [B, T, N, H], k and v [B, T, K, H] come before rotation, from x [B, T, D] after its norm.
    `layer` is the index of the layer, traced. `state` is threaded from layer to layer (a cache in
    decoding, None in training); `record` is returned stacked over the layers of a stack.
    """

    def __call__(
        self, q: Array, k: Array, v: Array, x: Array, layer: Array, state: Any
    ) -> tuple[Array, Any, Any]:
        """Attend in one layer."""


class ModelOutput(NamedTuple):
    """Result of a forward pass; `records` has one entry per stack."""

    prediction: Prediction
    state: Any
    records: tuple[Any, ...]

    @property
    def logits(self) -> Float[Array, "B T V"]:
        """Logits of all tokens, in float32; losses do without (`core.losses.token_losses`)."""
        return self.prediction.logits


def layer_stacks(config: ModelConfig) -> tuple[tuple[int, int, int], ...]:
    """Group consecutive layers with equal KV heads: (first layer, layers, KV heads) each."""
    stacks, first = [], 0
    for kv_heads, group in itertools.groupby(config.kv_heads_by_layer):
        length = len(list(group))
        stacks.append((first, length, kv_heads))
        first += length
    return tuple(stacks)


def _init(std: float = _INIT_STD) -> Callable:
    return nn.initializers.normal(std)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise `x`, in its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Projection(nn.Module):
    """A bias-free matrix between axes given by an einsum, in the dtype of its input."""

    equation: str
    shape: tuple[int, ...]
    std: float = _INIT_STD
    products: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Multiply `x` by the kernel."""
        kernel = self.param("kernel", _init(self.std), self.shape)
        # By name, since the policies of jax.checkpoint do not see into a gradient of our own.
        return checkpoint_name(project(self.equation, x, kernel, self.products), _PRODUCT)


class Block(nn.Module):
    """One layer: attention and SwiGLU MLP, each behind an RMSNorm, around the residual stream."""

    config: ModelConfig
    kv_heads: int
    attend: Attend
    sharding: jax.sharding.Sharding | None
    stacked: bool
    products: DTypeLike | None = None

    @nn.compact
    def __call__(self, carry: tuple[Array, Any], layer: Int[Array, ""] | int) -> tuple[tuple, Any]:
        """Carry (x [B, T, D], state) through the layer; also return what `attend` records."""
        c, (x, state) = self.config, carry
        D, N, K, H, F = c.width, c.heads, self.kv_heads, c.head_dim, c.mlp_width
        out_std = _INIT_STD * (2 * c.layers) ** -0.5

        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        q, k, v = self._multiply(y, "BTD,DNH->BTNH", "qkv", (N, K, K), H)
        out, state, record = self.attend(q, k, v, y, layer, state)
        x += self._by("BTNH,NHD->BTD", (N, H, D), "o", out_std)(out.astype(x.dtype))

        y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate, up = self._multiply(y, "BTD,DF->BTF", "gate_up", (F, F))
        x += self._by("BTF,FD->BTD", (F, D), "down", out_std)(nn.silu(gate) * up)
        if self.sharding is not None:
            x = jax.lax.with_sharding_constraint(x, self.sharding)
        return (x, state), record

    def _multiply(
        self, x: Array, equation: str, name: str, sizes: tuple[int, ...], *rest: int
    ) -> Sequence[Array]:
        """Multiply `x` by matrices [D, size, *rest], which are one where layers are unstacked."""
        D = x.shape[-1]
        if self.stacked:
            parts = zip(_SIDE_BY_SIDE[name], sizes, strict=True)
            return [self._by(equation, (D, size, *rest), part)(x) for part, size in parts]
        y = self._by(equation, (D, sum(sizes), *rest), name)(x)
        return jnp.split(y, np.cumsum(sizes)[:-1], axis=2)

    def _by(self, equation: str, shape: tuple[int, ...], name: str, std: float = _INIT_STD):
        return Projection(equation, shape, std, self.products, name=name)


_REMAT_POLICIES = {
    "full": None,  # recompute the whole layer
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),  # all but the products
}


class Llama(nn.Module):
    """Token ids to predictions (Touvron et al. 2023, arXiv 2302.13971).

    Attributes:
        config: sizes.
        dtype: of activations and products; parameters stay as they are.
        remat: none | full | dots, what the backward pass recomputes.
        sharding: of the residual stream [B, T, D], where several devices share the work.
        stacked: whether the parameters are those of `init_params`, which a scan runs through, or
            those of `unstack_layers`.
        products: dtype of the operands of the layers' products, where it is not `dtype`.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    sharding: jax.sharding.Sharding | None = None
    stacked: bool = True
    products: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        attend: Attend,
        state: Any = None,
        only: Int[Array, " B"] | None = None,
    ) -> ModelOutput:
        """Predict what follows every token, or one of each sequence.

        Args:
            tokens: ids in [0, V).
            attend: the attention function, which knows positions and documents.
            state: threaded through the layers' `attend`.
            only: index of the token of each sequence after which to predict; None: all.

        Returns:
            The prediction (T is 1 with `only`), the final state, and the records of each stack
            [layers, ...], or of each layer where they are not stacked.
        """
        c = self.config
        embedding = self.param("embedding", _init(), (c.vocab_size, c.width))
        # Rows first: so the gradient sums over equal tokens in the dtype of the parameters.
        x = embedding[tokens].astype(self.dtype)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[self.remat])
        records = []
        if self.stacked:
            for index, (first, length, kv_heads) in enumerate(layer_stacks(c)):
                # The names of the parameters are those of checkpoints, from before "stack".
                scanned = nn.scan(
                    block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length
                )(c, kv_heads, attend, self.sharding, True, self.products, name=f"run_{index}")
                (x, state), record = scanned((x, state), first + jnp.arange(length))
                records.append(record)
        else:
            for layer, kv_heads in enumerate(c.kv_heads_by_layer):
                name = f"layer_{layer}"
                one = block(c, kv_heads, attend, self.sharding, False, self.products, name=name)
                (x, state), record = one((x, state), layer)
                records.append(record)
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        head = embedding
        if not c.tied_embeddings:
            head = self.param("head", _init(), (c.width, c.vocab_size))
        return ModelOutput(Prediction(x, head, c.tied_embeddings), state, tuple(records))


def init_params(config: ModelConfig, key: Array, std: float = _INIT_STD) -> dict:
    """Draw fresh float32 parameters; `abstract_params` gives the shapes alone.

    Args:
        config: sizes.
        key: of the draw.
        std: standard deviation of all matrices, but for those into the residual stream, where it is
            divided by the root of twice the layers.
    """

    def attend(q, k, v, x, layer, state):  # shapes are all that initialisation needs
        return q, state, None

    params = Llama(config).init(key, jnp.zeros((1, 1), jnp.int32), attend=attend)["params"]
    if std == _INIT_STD:
        return params

    def scaled(path, x):
        return x if path[-1].key == "scale" else std / _INIT_STD * x

    return jax.tree_util.tree_map_with_path(scaled, params)


def unstack_layers(
    params: dict, config: ModelConfig, dtype: DTypeLike, *, give_up: bool = False
) -> dict:
    """Arrange parameters for decoding: an entry per layer, matrices as the forward pass wants.

    A scan reads each layer's matrices out of the stack, that is copies them, and a forward pass
    narrows them. Where a pass reads one token, that costs as much as the work itself. Matrices of
    the same activations become one: fewer and larger products.

    Args:
        params: as of `init_params`; unstacked ones stay so.
        config: their sizes.
        dtype: of the forward pass. Norms keep theirs.
        give_up: whether the stacks are deleted one by one as they are read, where nobody else
            wants `params`: or both trees are there at once. Not under `jit`.

    Returns:
        Parameters for a `Llama` with `stacked=False`, whose logits are the same.
    """

    def narrowed(path, x):
        return x if path[-1].key == "scale" else x.astype(dtype)

    def of_layer(i, parts):
        def joined(path, *leaves):
            leaves = [narrowed(path, leaf[i]) for leaf in leaves]
            return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)

        return jax.tree_util.tree_map_with_path(joined, *parts)

    alone = {name: leaf for name, leaf in params.items() if name[:4] != "run_"}
    unstacked = jax.tree_util.tree_map_with_path(narrowed, alone)
    for stack, (first, length, _) in enumerate(layer_stacks(config)):
        if f"run_{stack}" not in params:
            continue
        single = dict(params[f"run_{stack}"])
        joint = {
            name: [single.pop(part) for part in parts] for name, parts in _SIDE_BY_SIDE.items()
        }
        for name, parts in (joint | {name: [part] for name, part in single.items()}).items():
            for i in range(length):
                unstacked.setdefault(f"layer_{first + i}", {})[name] = of_layer(i, parts)
            if give_up:
                jax.tree.map(lambda x: x.delete(), parts)
    return unstacked


def forward(
    params: dict,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    dtype: DTypeLike,
    **inputs: Any,
) -> ModelOutput:
    """Run a pass of `Llama` with parameters of `init_params` or of `unstack_layers`.

    Args:
        params: of either kind.
        config: their sizes.
        tokens: ids in [0, V).
        dtype: of activations and products.
        inputs: `attend`, `state` and `only`, as in `Llama`.
    """
    model = Llama(config, dtype=jnp.dtype(dtype), stacked="layer_0" not in params)
    return model.apply({"params": params}, tokens, **inputs)


@functools.cache
def abstract_params(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters of `init_params`, without making any."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Count the parameters, without making any."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
