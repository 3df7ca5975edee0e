"""How long requests wait for their first token, and for each after it, in one engine.

    python -m benchmarks.serving
    python -m benchmarks.serving --against=CHECKOUT

Requests of very different lengths (prompts log-uniform, new tokens uniform) arrive all together, or
in a stream, with exponential times between them. A model with random weights (`random_model`)
serves them at one compression ratio; the pool holds all of them, so nobody gives pages back. All
is served once before it is measured, so that nothing is left to compile.

`--against` runs the same with the package of another checkout too, by turns, in processes of their
own, for what a change does.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import random_model
from benchmarks.random_model import WIDE
from dmc_jax.evaluation.machine import machine
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.throughput import NoText

RATIO, SEATS, PAGE = 4, 16, 16
PROMPTS, NEW = (16, 1000), (16, 64)  # tokens, least and most
KV_BYTES = 2**29  # all that can run at a time, uncompressed


def workload(requests: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts, and how many tokens follow each."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(*np.log(PROMPTS), requests)).astype(int)
    new = rng.integers(NEW[0], NEW[1] + 1, requests)
    return [
        (rng.integers(0, WIDE.vocab_size, n).tolist(), SamplingParams(int(m), temperature=0.0))
        for n, m in zip(lengths, new, strict=True)
    ]


def serve(engine: Engine, requests: list, arrivals: np.ndarray) -> dict:
    """Submits each request at its time, in seconds, and says how long everything took."""
    waiting = list(zip(arrivals, requests, strict=True))
    start, first, gaps, last = time.perf_counter(), [], [], {}
    came = {}
    while waiting or engine.unfinished:
        now = time.perf_counter() - start
        while waiting and waiting[0][0] <= now:
            at, request = waiting.pop(0)
            came[engine.submit(*request)] = at
        if not engine.unfinished:
            time.sleep(waiting[0][0] - now)
            continue
        events = engine.step()
        now = time.perf_counter() - start
        for sequence in {event.sequence for event in events}:
            if sequence in last:
                gaps.append(now - last[sequence])
            else:
                first.append(now - came[sequence])
            last[sequence] = now
    seconds = time.perf_counter() - start
    tokens = sum(params.max_new_tokens for _, params in requests)
    return {
        "first_token_seconds": spread(first),
        "between_tokens_seconds": spread(gaps),
        "seconds": round(seconds, 2),
        "new_tokens_per_second": round(tokens / seconds, 1),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """The middle of some times, and what is seldom exceeded."""
    values = {"mean": np.mean(seconds), "median": np.median(seconds)}
    values |= {"p95": np.quantile(seconds, 0.95), "most": np.max(seconds)}
    return {name: round(float(value), 3) for name, value in values.items()}


def measure(requests: int, rate: float) -> dict:
    """Both ways of arriving, with the package that is imported."""
    model = random_model.make(WIDE, (RATIO,))
    engine = Engine(
        model.params,
        model.config,
        NoText(model.config.vocab_size),
        policy=model.policies[RATIO],
        max_sequences=SEATS,
        kv_bytes=KV_BYTES,
        page_size=PAGE,
    )
    work = workload(requests)
    at_once = np.zeros(requests)
    stream = np.cumsum(np.random.default_rng(1).exponential(1 / rate, requests))
    for arrivals in (at_once, stream / 2):  # compiles
        serve(engine, work, arrivals)
    return {"together": serve(engine, work, at_once), "stream": serve(engine, work, stream)}


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals a second in the stream")
    parser.add_argument("--against", type=Path, help="another checkout to run by turns")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("serving_cpu.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.one:
        print(json.dumps(measure(options.requests, options.rate)))
        return
    here = Path(__file__).parents[1]
    sides = {"here": here} | ({"against": options.against} if options.against else {})
    rounds = []
    for _ in range(options.rounds):
        rounds.append({})
        for name, folder in reversed(sides.items()):
            rounds[-1][name] = run_with(folder, options)
            print(name, json.dumps(rounds[-1][name], indent=1), flush=True)
    about = {
        "measures": "seconds to the first token and between tokens, of requests that come together"
        " or in a stream",
        "machine": machine(" ".join(["python -m benchmarks.serving", *map(_shown, sys.argv[1:])])),
        "model": random_model.sizes(WIDE),
        "ratio": RATIO,
        "seats": SEATS,
        "prompt_tokens": PROMPTS,
        "new_tokens": NEW,
        "requests": options.requests,
        "arrivals_per_second": options.rate,
        "commits": {name: commit_of(folder) for name, folder in sides.items()},
    }
    options.output.write_text(json.dumps(about | {"rounds": rounds}, indent=2) + "\n")
    print(f"wrote {options.output}")


def _shown(argument: str) -> str:
    """What was typed, but for where the other checkout lies; its commit is told."""
    return "--against=CHECKOUT" if argument.startswith("--against=") else argument


def run_with(folder: Path, options: argparse.Namespace) -> dict:
    """A process of its own, that imports the package of a checkout."""
    sizes = [f"--requests={options.requests}", f"--rate={options.rate}"]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *sizes],
        env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(folder: Path) -> str:
    """Which commit a checkout has, and whether it is changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
