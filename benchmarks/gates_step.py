"""A step of distilling gates beside the same products in PyTorch.

    pip install torch transformers
    python -m benchmarks.gates_step

SmolLM2 135M's sizes, random weights, one window of 1,024 tokens. Ours: the dense model, the model
with gates (delayed eviction, delayed merging), their divergence, its gradient, Adam; products in
bfloat16, and for eviction in float32 too. PyTorch: no gates at all, only what any such step has to
multiply: transformers' Llama with scaled_dot_product_attention, forward without a gradient, forward
again, the divergence on as many ids, and the gradient of the embedded tokens, all in bfloat16, as
fast as float32 or faster there. All take turns; medians.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.training import medians
from benchmarks.transformers_generate import transformers_config
from dmc_jax.config import GatesConfig, MeshConfig, RunConfig
from dmc_jax.evaluation.machine import machine
from dmc_jax.model.llama import init_params
from dmc_jax.model.sharding import make_mesh
from dmc_jax.training import gated

LENGTH = 1024


def our_step(run: RunConfig, params, batch, counts):
    """What takes a step."""
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), gated.make_optimizer(run)
    trained = gated.empty(run)
    gates = trained["policy"].gates
    drawn = jax.random.normal(jax.random.key(1), gates.weight.shape) * gates.weight.shape[1] ** -0.5
    gates = dataclasses.replace(gates, weight=drawn, deviation=jnp.ones_like(gates.deviation))
    trained["policy"] = dataclasses.replace(trained["policy"], gates=gates)
    state = [gated.state_of(trained, optimizer)]
    step = gated.make_distill_step(run, mesh, optimizer, counts)

    def take():
        state[0], metrics = step(state[0], batch, params)
        return metrics

    return take


def their_step(c, tokens: np.ndarray, ids: int):
    """What multiplies as much in PyTorch."""
    model = transformers.LlamaModel(transformers_config(c)).bfloat16().requires_grad_(False)
    head = model.embed_tokens.weight[:ids]
    embedded = model.embed_tokens(torch.from_numpy(tokens)).requires_grad_()

    def predict():
        hidden = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return (hidden @ head.T).float().log_softmax(-1)

    def take():
        with torch.no_grad():
            taught = predict()
        apart = torch.nn.functional.kl_div(predict(), taught, log_target=True, reduction="sum")
        (gradient,) = torch.autograd.grad(apart, embedded)
        return np.asarray(gradient.float().sum())

    return take


def main() -> None:
    """Times, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    output = Path(__file__).with_name("gates_step_cpu.json")
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    run = RunConfig.named("gates:smollm2_135m")
    model = run.model
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, LENGTH), np.int32)
    ones = np.ones((1, LENGTH), np.float32)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "positions": np.arange(LENGTH, dtype=np.int32)[None],
        "segment_ids": ones.astype(np.int32),
        "loss_mask": ones,
    }
    params = init_params(model, jax.random.key(0))
    counts = np.ones(model.vocab_size, np.float32)
    versions = {
        f"{method}, products in {products}": our_step(
            dataclasses.replace(run, products=products, gates=GatesConfig(method=method)),
            *(params, batch, counts),
        )
        for method, products in (("dms", "bfloat16"), ("dms", "float32"), ("dmc", "bfloat16"))
    }
    versions["PyTorch, without gates"] = their_step(
        model, tokens.astype(np.int64), run.gates.vocabulary + LENGTH
    )
    seconds = medians(versions, options.rounds)
    cores = torch.get_num_threads()
    record = {
        "measures": "seconds of a step of 1,024 tokens, and tokens a second and core",
        "machine": machine(" ".join(["python -m benchmarks.gates_step", *sys.argv[1:]])),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": {name: round(x, 3) for name, x in seconds.items()},
        "tokens_per_second_and_core": {
            name: round(LENGTH / x / cores, 1) for name, x in seconds.items()
        },
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
