"""The engine's dense policy against `generate` of transformers: the baseline of every other ratio.

    pip install torch transformers
    python -m benchmarks.transformers_generate

The same random weights in float32, the same prompts of 128 tokens, greedy, on the same CPU threads,
batch 1 and 8. Both sides take turns. The time of one step is that of a run with many new tokens
less that of one with few, so that neither prompt nor set-up counts; medians over the rounds. The
tokens of both sides are compared: the file says how many agree.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from benchmarks import random_model
from dmc_jax.config import ModelConfig
from dmc_jax.evaluation.machine import machine
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.throughput import NoText
from dmc_jax.interop.parameters import flatten, places, to_foreign
from dmc_jax.model.llama import init_params
from dmc_jax.policies.dense import Dense

MODEL = ModelConfig(
    vocab_size=8192,
    width=1024,
    layers=8,
    heads=16,
    kv_heads=16,
    head_dim=64,
    mlp_width=2816,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_length=1024,
    tied_embeddings=True,
)
PROMPT, FEW, MANY = 128, 8, 72
BATCHES = (1, 8)


def transformers_config(c: ModelConfig) -> transformers.LlamaConfig:
    """The same sizes there, of a model with tied embeddings."""
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_length,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def transformers_model(params: dict) -> transformers.LlamaForCausalLM:
    """The same model there."""
    model = transformers.LlamaForCausalLM(transformers_config(MODEL))
    leaves, weights = flatten(params), {}
    for name, place in places(MODEL).items():
        leaf = np.asarray(leaves[place.leaf])
        leaf = leaf if place.layer is None else leaf[place.layer]
        foreign = to_foreign(place, lambda begin, end, x=leaf: x[begin:end], leaf.dtype)
        weights[name] = torch.from_numpy(foreign)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model.eval()


def compare(params: dict, theirs: transformers.LlamaForCausalLM, batch: int, rounds: int) -> dict:
    """Milliseconds of a decoding step on either side, and how many tokens agree."""
    engine = Engine(
        params,
        MODEL,
        NoText(MODEL.vocab_size),
        policy=Dense(),
        max_sequences=batch,
        pages=10**6,
        max_length=PROMPT + MANY,
    )
    prompts = random_model.random_tokens(MODEL, batch, PROMPT, seed=batch)
    inputs = torch.from_numpy(prompts).long()
    everything = torch.ones_like(inputs)

    def engine_tokens(new: int) -> np.ndarray:
        results = engine.generate(prompts.tolist(), SamplingParams(new, temperature=0.0))
        return np.array([result.tokens for result in results])

    def transformers_tokens(new: int) -> np.ndarray:
        with torch.inference_mode():
            ids = theirs.generate(
                inputs, attention_mask=everything, max_new_tokens=new, do_sample=False
            )
        return ids[:, PROMPT:].numpy()

    sides = {"engine": engine_tokens, "transformers": transformers_tokens}
    steps, said = {name: [] for name in sides}, {}
    for turn in range(-1, rounds):
        for name, generate in sides.items():
            seconds = []
            for new in (FEW, MANY):
                start = time.perf_counter()
                said[name] = generate(new)
                seconds.append(time.perf_counter() - start)
            if turn >= 0:
                steps[name].append(1e3 * (seconds[1] - seconds[0]) / (MANY - FEW))
    median = {name: round(statistics.median(times), 2) for name, times in steps.items()}
    return {
        "batch": batch,
        "milliseconds_per_step": median,
        "all_rounds": {name: [round(x, 2) for x in times] for name, times in steps.items()},
        "engine_faster": round(median["transformers"] / median["engine"], 2),
        "tokens_that_agree": round(float((said["engine"] == said["transformers"]).mean()), 4),
    }


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("transformers_generate_cpu.json")
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    params = init_params(MODEL, jax.random.key(0))
    theirs = transformers_model(params)
    results = []
    for batch in BATCHES:
        results.append(compare(params, theirs, batch, options.rounds))
        print(json.dumps(results[-1]))
    report = {
        "measures": "milliseconds of a decoding step, dense policy against transformers, medians",
        "machine": machine(" ".join(["python -m benchmarks.transformers_generate", *sys.argv[1:]])),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "attention": theirs.config._attn_implementation,
        "model": random_model.sizes(MODEL),
        "prompt_tokens": PROMPT,
        "dtype": "float32",
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
