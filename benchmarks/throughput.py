"""How many sequences, and how many tokens a second, the same bytes of cache give.

    python -m benchmarks.throughput

Requests of one prompt length and one number of new tokens stand in a queue; the engine admits what
fits into `kv_bytes`. One model with random weights (`random_model`) serves them three times: never
merging (the same engine, pages and code), and with its threshold set for 4x and 8x. The slots of
the engine are as many as the budget should hold, so that the dense run pays for no empty ones.

Reported: sequences in the cache, averaged over the decoding steps; new tokens a second, prompts and
waiting included, compilation not; how often a sequence had to give its pages back.
`experiments/throughput.py` plots the same over several budgets.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

from benchmarks import random_model
from benchmarks.random_model import WIDE, RandomModel
from dmc_jax.evaluation.machine import machine
from dmc_jax.inference import throughput
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.throughput import NoText, warm_up

MODEL = dataclasses.replace(WIDE, max_length=1024)
RATIOS = (1, 4, 8)
PROMPT, NEW, PAGE = 512, 256, 16
# Keys and values of a dense sequence at its end, float32.
SEQUENCE_BYTES = (PROMPT + NEW) * MODEL.kv_rows * 2 * MODEL.head_dim * 4


def serve(
    model: RandomModel, ratio: float, kv_bytes: int, requests: int, kv_dtype: str = "float32"
) -> dict:
    """Serves all requests at one ratio, 1 for dense, and says what that took."""
    slots = ratio * kv_bytes / SEQUENCE_BYTES
    if kv_dtype == "int8":
        slots *= 4 * MODEL.head_dim / (MODEL.head_dim + 4)  # with a float32 scale
    seats = min(requests, max(1, round(1.1 * slots)))
    engine = Engine(
        model.params,
        model.config,
        NoText(model.config.vocab_size),
        policy=model.policies[ratio],
        max_sequences=seats,
        kv_bytes=kv_bytes,
        page_size=PAGE,
        max_length=PROMPT + NEW,
        kv_dtype=kv_dtype,
    )
    prompts = random_model.random_tokens(model.config, requests, PROMPT, seed=2).tolist()
    warm_up(engine, prompts[0], NEW)
    return throughput.serve(engine, prompts, NEW)._asdict()


def compare(model: RandomModel, kv_bytes: int, requests: int) -> dict:
    """All ratios with one budget, in one run."""
    served = {f"{ratio}x": serve(model, ratio, kv_bytes, requests) for ratio in RATIOS}
    return {
        "kv_bytes": kv_bytes,
        "requests": requests,
        "served": served,
        "times_dense": {
            name: {
                what: round(one[what] / served["1x"][what], 2)
                for what in ("sequences", "tokens_per_second")
            }
            for name, one in served.items()
        },
    }


def about(model: RandomModel, command: str) -> dict:
    """What a JSON file of these figures begins with."""
    return {
        "measures": "sequences in the cache and new tokens a second, at equal bytes of cache",
        "machine": machine(command),
        "model": random_model.sizes(model.config),
        "weights": "random; thresholds set on random tokens for the ratios",
        "row_ratios_least_mean_greatest": model.row_ratios,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "page": PAGE,
        "dtype": "float32",
    }


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4, help="dense ones that the budget holds")
    parser.add_argument("--requests", type=int, default=32, help="in the queue")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("throughput_cpu.json")
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    model = random_model.make(MODEL, RATIOS[1:])
    result = compare(model, options.sequences * SEQUENCE_BYTES, options.requests)
    print(json.dumps(result, indent=1))
    command = " ".join(["python -m benchmarks.throughput", *sys.argv[1:]])
    options.output.write_text(
        json.dumps(about(model, command) | {"result": result}, indent=2) + "\n"
    )
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
