"""Cost of DMC in training: `python -m benchmarks.training` writes benchmarks/training_cpu.json.

Two questions, each answered by ratios taken in one run:

* a DMC (retrofit) step against a dense (pretrain) step of the same model, batch and settings;
* blocked attention with a key bias against the naive form, forward and backward: time, and
  temporaries as XLA reports them.

Versions take turns, so that a change in the machine's speed meets both; medians are compared.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.config import (
    CompressionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.evaluation.machine import machine
from dmc_jax.model.presets import PRESETS
from dmc_jax.model.sharding import batch_sharding, make_mesh
from dmc_jax.training.optimizer import make_optimizer
from dmc_jax.training.state import init_state
from dmc_jax.training.step import make_train_step

WIDE = ModelConfig(
    vocab_size=1024,
    width=512,
    layers=2,
    heads=8,
    kv_heads=8,
    head_dim=64,
    mlp_width=1408,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_length=2048,
    tied_embeddings=True,
)


def medians(versions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each version, called in turn `rounds` times after one warm-up."""
    for run in versions.values():
        jax.block_until_ready(run())
    times = {name: [] for name in versions}
    for _ in range(rounds):
        for name, run in versions.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def training_step(model: ModelConfig, batch: int, length: int, dtype: str, rounds: int) -> dict:
    """Seconds of a dense and of a DMC step."""
    stage = StageConfig(steps=100, learning_rate=1e-3)
    run = RunConfig(
        name="benchmark",
        model=model,
        dmc=DMCSettings(),
        compression=CompressionConfig(ratio=4.0),
        data=DataConfig(length=length, batch=batch),
        pretrain=stage,
        zero_out=stage,
        retrofit=stage,
        finetune=stage,
        compute_dtype=dtype,
        remat="dots",
        attention_block=min(256, length // 2),
        mesh=MeshConfig(),
    )
    mesh = make_mesh(run.mesh)
    optimizer = make_optimizer(run.optimizer, 1.0)
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, model.vocab_size)
    inputs = {
        "tokens": tokens,
        "targets": tokens,
        "positions": jnp.broadcast_to(jnp.arange(length), (batch, length)),
        "segment_ids": jnp.ones((batch, length), jnp.int32),
        "loss_mask": jnp.ones((batch, length)),
    }
    inputs = jax.device_put(inputs, batch_sharding(mesh))
    versions = {}
    for name, stage_name in (("dense", "pretrain"), ("dmc", "retrofit")):
        step = make_train_step(run, stage_name, mesh, optimizer)
        state = [init_state(model, optimizer, mesh, 0)]

        def take(step=step, state=state):
            state[0], metrics = step(state[0], inputs, None)
            return metrics

        versions[name] = take
    seconds = medians(versions, rounds)
    return {
        "width": model.width,
        "layers": model.layers,
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "seconds": seconds,
        "dmc_over_dense": seconds["dmc"] / seconds["dense"],
    }


def naive_attention(q, k, v, bias, *, scale):
    """The whole score matrix, as a formula; G = 1."""
    T = q.shape[1]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    bias = bias.transpose(0, 2, 1)[:, :, None, :]
    scores += jnp.where(jnp.eye(T, dtype=bool), 0.0, bias)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)


def attention(length: int, heads: int, head_dim: int, rounds: int) -> dict:
    """Seconds and temporaries of blocked and naive attention, forward and backward."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, length, heads, head_dim)) for key in keys[:3])
    bias = -jax.random.uniform(keys[3], (1, length, heads))
    versions, temporaries = {}, {}
    for name, function in (("blocked", causal_attention), ("naive", naive_attention)):
        attend = functools.partial(function, scale=head_dim**-0.5)

        def loss(q, k, v, bias, attend=attend):
            return jnp.sum(attend(q, k, v, bias) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, v, bias).compile()
        versions[name] = functools.partial(gradient, q, k, v, bias)
        temporaries[name] = gradient.memory_analysis().temp_size_in_bytes
    seconds = medians(versions, rounds)
    return {
        "length": length,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": "float32",
        "seconds": seconds,
        "temporary_bytes": temporaries,
        "naive_over_blocked": {
            "time": seconds["naive"] / seconds["blocked"],
            "memory": temporaries["naive"] / temporaries["blocked"],
        },
    }


def main() -> None:
    """Measure, print, write the JSON."""
    tiny = PRESETS["tiny"]
    result = {
        "machine": machine("python -m benchmarks.training"),
        "training_step": [
            training_step(tiny, batch=8, length=256, dtype="float32", rounds=30),
            training_step(tiny, batch=8, length=256, dtype="bfloat16", rounds=30),
            training_step(WIDE, batch=1, length=2048, dtype="float32", rounds=10),
            training_step(WIDE, batch=1, length=2048, dtype="bfloat16", rounds=10),
        ],
        "attention": [
            attention(length, heads=8, head_dim=64, rounds=5) for length in (512, 1024, 2048)
        ],
    }
    for row in result["training_step"]:
        print(
            f"width {row['width']:4d}  T {row['length']:4d}  {row['dtype']:8s}  "
            f"dense {1e3 * row['seconds']['dense']:7.1f} ms  "
            f"dmc {1e3 * row['seconds']['dmc']:7.1f} ms  ratio {row['dmc_over_dense']:.2f}"
        )
    for row in result["attention"]:
        gain = row["naive_over_blocked"]
        print(
            f"attention T {row['length']:4d}  blocked {1e3 * row['seconds']['blocked']:7.1f} ms  "
            f"naive / blocked: time {gain['time']:.2f}, temporaries {gain['memory']:.1f}"
        )
    output = Path(__file__).parent / "training_cpu.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
