"""Decode attention over a compressed cache against a dense one, on this machine's CPU.

    python -m benchmarks.decode_attention_cpu

One decoding step of one layer: batch 4, 8 KV heads, width 64, at 4096 tokens. A dense cache holds
4096 slots a row; a cache compressed 4x or 8x holds 1024 or 512 on average, unevenly (log-normal).
The contenders of one run:

    dense        softmax attention over contiguous [B,K,S,H] arrays in plain jnp
    dense_twice  the same with every query given twice, where G = 1: XLA's bfloat16 product of a
                 matrix and a single vector is some ten times slower than of two
    paged        this kernel over pages, every row full
    4x, 8x       this kernel over pages, ragged

Each is measured in two states of the CPU's caches. "warm": called over and over, so that a
compressed cache that fits stays there (the dense one does not). "cold": all contenders in turn, so
that each finds the caches filled by another, as in a model whose other layers come in between.
Times are medians over the rounds; nothing is asserted on them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dmc_jax.evaluation.machine import machine
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.workloads import Workload, make_inputs, ragged_lengths

TOKENS, BATCH, KV_HEADS, WIDTH = 4096, 4, 8, 64
ROWS, SCALE = BATCH * KV_HEADS, WIDTH**-0.5
RATIOS = (4, 8)
CASES = [
    (dtype, queries, page)
    for dtype in ("float32", "bfloat16")
    for queries in (1, 4)
    for page in (16, 64)
]


def dense_attention(q, k, v):
    """Attends with q [B,K,G,H] to all of k, v [B,K,S,H]; float32 sums and softmax."""
    f32 = jnp.float32
    scores = SCALE * jnp.einsum("BKGH,BKSH->BKGS", q, k, preferred_element_type=f32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights, v, preferred_element_type=f32).astype(q.dtype)


def dense_attention_twice(q, k, v):
    """The same, answering every query twice."""
    return dense_attention(jnp.repeat(q, 2, axis=2), k, v)[:, :, ::2]


def paged_attention(*inputs):
    """The kernel that this machine's users get."""
    return decode_attention(*inputs, scale=SCALE)


def contenders(dtype: str, queries: int, page: int) -> dict[str, Callable[[], jax.Array]]:
    """Makes the inputs of one case; returns what to call for each contender."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    q = normal(BATCH, KV_HEADS, queries, WIDTH)
    k, v = (normal(BATCH, KV_HEADS, TOKENS, WIDTH) for _ in range(2))
    calls = {"dense": (dense_attention, (q, k, v))}
    if queries == 1:
        calls["dense_twice"] = (dense_attention_twice, (q, k, v))
    lengths = {"paged": (TOKENS,) * ROWS}
    for ratio in RATIOS:
        lengths[f"{ratio}x"] = ragged_lengths(ROWS, mean=TOKENS // ratio, longest=TOKENS)
    for name, drawn in lengths.items():
        workload = Workload(name, drawn, queries, WIDTH, page, dtype, longest=TOKENS)
        calls[name] = (paged_attention, make_inputs(workload))
    return {name: _bind(jax.jit(function), inputs) for name, (function, inputs) in calls.items()}


def _bind(function, inputs) -> Callable[[], jax.Array]:
    return lambda: jax.block_until_ready(function(*inputs))


def median_ms(
    calls: dict[str, Callable[[], jax.Array]], rounds: int, caches: str
) -> dict[str, float]:
    """Calls every contender `rounds` times, and twice before that to warm up; medians in ms."""
    turns = [(name, turn) for turn in range(-2, rounds) for name in calls]
    if caches == "warm":
        turns.sort(key=lambda turn: turn[0])  # all turns of one contender, then of the next
    seconds = {name: [] for name in calls}
    for name, turn in turns:
        start = time.perf_counter()
        calls[name]()
        if turn >= 0:
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(taken), 4) for name, taken in seconds.items()}


def measure(dtype: str, queries: int, page: int, rounds: int) -> list[dict]:
    """Measures one case; ratios say how many times faster than the better dense form, and paged."""
    calls = contenders(dtype, queries, page)
    results = []
    for caches in ("warm", "cold"):
        median = median_ms(calls, rounds, caches)
        dense = min(time for name, time in median.items() if name.startswith("dense"))
        paged = median["paged"]
        results.append(
            {
                "dtype": dtype,
                "queries": queries,
                "page": page,
                "caches": caches,
                "median_ms": median,
                "faster_than_dense": {f"{r}x": round(dense / median[f"{r}x"], 2) for r in RATIOS},
                "faster_than_paged": {f"{r}x": round(paged / median[f"{r}x"], 2) for r in RATIOS},
            }
        )
    return results


def print_row(result: dict) -> None:
    """Prints one line of the table; the head where there is no result yet."""
    columns = ("dense", "dense_twice", "paged", *(f"{r}x" for r in RATIOS))
    head = [f"{r}x/{against}" for against in ("dense", "paged") for r in RATIOS]
    if not result:
        print(f"{'dtype':9} G page caches", *(f"{name:>11}" for name in (*columns, *head)))
        return
    median = result["median_ms"]
    times = [f"{median[name]:11.2f}" if name in median else f"{'-':>11}" for name in columns]
    ratios = [*result["faster_than_dense"].values(), *result["faster_than_paged"].values()]
    print(
        f"{result['dtype']:9} {result['queries']} {result['page']:4} {result['caches']:6}",
        *times,
        *(f"{ratio:11.2f}" for ratio in ratios),
    )


def main() -> None:
    """Measures every case, prints a table row for each and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="calls of each contender")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {options.rounds}")
    jax.config.update("jax_platforms", "cpu")
    where = machine("python -m benchmarks.decode_attention_cpu")
    print(f"{where['cpu']}, {where['cores']} cores, jax {where['jax']}; ms, then times faster")
    print_row({})
    results = []
    for case in CASES:
        for result in measure(*case, options.rounds):
            print_row(result)
            results.append(result)
    report = {
        "measures": "one decoding step's attention, compressed cache against dense, medians",
        "command": " ".join(["python -m benchmarks.decode_attention_cpu", *sys.argv[1:]]),
        "machine": where,
        "tokens": TOKENS,
        "batch": BATCH,
        "kv_heads": KV_HEADS,
        "width": WIDTH,
        "rounds": options.rounds,
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
