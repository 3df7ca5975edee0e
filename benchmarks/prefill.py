"""Reading a prompt: all tokens at once against one at a time, and compressed against dense.

    python -m benchmarks.prefill

One prompt of 1024 tokens (and of 4096, where attention is a larger part of the work) into an empty
cache, by models with random weights whose threshold is set for 4x and 8x (`random_model`), one of
the demo's width and one of four times that:

    one_by_one   `decode_step` for every token, in a loop on the device, dense and 4x
    dense        parallel prefill of the model that never merges, through the same pages
    4x, 8x       parallel prefill

Contenders take turns; times are medians, compilation excluded. Nothing is asserted on them.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_model
from benchmarks.random_model import WIDE
from dmc_jax.config import ModelConfig
from dmc_jax.evaluation.machine import machine
from dmc_jax.inference import paged_cache
from dmc_jax.inference.decoding import decode_step
from dmc_jax.inference.prefill import prefill
from dmc_jax.model.llama import unstack_layers
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.policy import Policy

TINY = dataclasses.replace(PRESETS["tiny"], max_length=4096)
CASES = ((TINY, 1024), (WIDE, 1024), (WIDE, 4096))
PAGE = 16
RATIOS = (4, 8)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read_one_by_one(params, config, cache, tokens, policy):
    """The cache and the last logits after reading tokens [T] into seat 0."""

    def read(i, carry):
        return decode_step(
            params,
            config,
            carry[0],
            tokens[i][None],
            jnp.ones(1, bool),
            policy=policy,
        )

    return jax.lax.fori_loop(0, tokens.size, read, (cache, jnp.zeros((1, config.vocab_size))))


def empty_cache(config: ModelConfig, policy: Policy, tokens: int) -> paged_cache.PagedCache:
    """With pages for one dense sequence."""
    pages = config.kv_rows * -(-tokens // PAGE)
    return paged_cache.init(
        config, policy, seats=1, pages=pages, page_size=PAGE, max_length=tokens, dtype=jnp.float32
    )


def measure(model: random_model.RandomModel, tokens: int, rounds: int, one_by_one: bool) -> dict:
    """Median seconds of each contender, and how many slots a token took."""
    config = model.config
    params = unstack_layers(model.params, config, jnp.float32)
    prompt = random_model.random_tokens(config, tokens, seed=1)
    contenders = {"dense": (model.policies[1], False)}
    contenders |= {f"{r}x": (model.policies[r], False) for r in RATIOS}
    if one_by_one:
        contenders["one_by_one_dense"] = model.policies[1], True
        contenders["one_by_one_4x"] = model.policies[4], True
    seconds, ratios, logits = {name: [] for name in contenders}, {}, {}
    for turn in range(-1, rounds):
        for name, (policy, single) in contenders.items():
            if single and turn > 1:
                continue  # slow, and its time hardly varies
            cache = jax.block_until_ready(empty_cache(config, policy, tokens))
            start = time.perf_counter()
            if single:
                result = read_one_by_one(params, config, cache, jnp.asarray(prompt), policy)
            else:
                result = prefill(params, config, cache, [prompt], [0], policy=policy)
            cache, logits[name] = jax.block_until_ready(result)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            ratios[name] = round(float(tokens * config.kv_rows / cache.lengths.sum()), 3)
    for one in ("dense", "4x") if one_by_one else ():
        np.testing.assert_allclose(logits[one], logits[f"one_by_one_{one}"], atol=1e-4)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    report = {
        "model": random_model.sizes(config),
        "row_ratios_least_mean_greatest": {f"{r}x": model.row_ratios[r] for r in RATIOS},
        "tokens": tokens,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "measured_ratio": ratios,
        "faster_than_dense": {f"{r}x": round(median["dense"] / median[f"{r}x"], 2) for r in RATIOS},
    }
    if one_by_one:
        report["faster_than_one_by_one"] = {
            one: round(median[f"one_by_one_{one}"] / median[one], 1) for one in ("dense", "4x")
        }
    return report


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("prefill_cpu.json"))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    results = []
    for config, tokens in CASES:
        model = random_model.make(config, RATIOS)
        results.append(measure(model, tokens, options.rounds, one_by_one=tokens == 1024))
        print(json.dumps(results[-1]))
    report = {
        "measures": "seconds to read a prompt into the cache, medians",
        "machine": machine(" ".join(["python -m benchmarks.prefill", *sys.argv[1:]])),
        "weights": "random; thresholds set on random tokens for the ratios",
        "page": PAGE,
        "dtype": "float32",
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
