"""What decoding steps are lowered from, for a GPU on a machine that need not have one."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import paged_cache
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.policies.dmc import DMC

PAGES, PAGE, SEATS = 96, 16, 4
CONFIG = ModelConfig(
    vocab_size=50,
    width=64,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=64,
    mlp_width=48,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_length=512,
    tied_embeddings=False,
)


def mesh_of(kind, **sizes):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    # Automatic, as without a mesh: else jax 0.12 wants to know how every array is sharded.
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, abstract_device=device
    )


def on(kind):
    return use_abstract_mesh(mesh_of(kind, x=1))


def empty_cache():
    return paged_cache.init(
        *(CONFIG, DMC(DMCSettings())),
        seats=SEATS,
        pages=PAGES,
        page_size=PAGE,
        max_length=512,
        dtype=jnp.bfloat16,
        tokens=jnp.bfloat16,
    )


def shapes_of_a_step():
    def make():
        params = unstack_layers(init_params(CONFIG, jax.random.key(0)), CONFIG, jnp.bfloat16)
        return params, empty_cache(), jnp.zeros(SEATS, jnp.int32), jnp.ones(SEATS, bool)

    return jax.eval_shape(make)
