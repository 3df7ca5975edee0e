"""Tokens a second of a 7B model on one GPU, against batch size: dense, 4x and 8x.

    python -m benchmarks.end_to_end                              # --resume goes on after a cut
    python -m benchmarks.end_to_end --quick --model=tiny         # on any device: whether it works

What is timed is the engine's own program for a step, `inference.programs.next_tokens`: forward
pass, merging or appending, pages, attention, the most likely token. Left out: prompts, the host's
bookkeeping between steps, waiting for a place.

The weights are random, made on the device in bfloat16 a matrix at a time. What they would decide
says nothing of a trained model, so rows are given the lengths that they would have in one. The demo
measured the ratio of every layer and KV head of a model trained for 4x (`demo_cpu.json`, 16 heads,
1.3x to 18x). Every layer here gets these heads' slots per token, as often as it takes, in random
order, scaled so that their mean is one over the ratio asked for (for 8x: half of what was
measured). After n tokens a row has that many slots times n; sequences are alike. The pages are full
of random keys and values and lie in random order over the pool.

From there the model decides by itself in steps that are timed, with one threshold for all heads,
set by bisection so that the mean row grows as it should: 1 / ratio slots a step. The rows do not
drift far in the few steps. Steps are timed after the prompt, halfway and at the end of the
generation; the time of the whole is the integral of the parabola through them (Simpson's rule).

The largest batch is what fits into the memory given, by its bytes at the end of generation: pages,
page tables, open segments (12 float32 keys and values a row), weights, and a reserve for
activations. Floors: the bytes of all weights, or of them and of the live slots, at the rate of
copying measured in the same run. No step can be faster unless it reads less.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax

from benchmarks.end_to_end_step import DTYPE, Run, Setup, largest_batch, measure, random_params
from dmc_jax.model.presets import PRESETS
from pallas_kernels import timing
from pallas_kernels.decode_attention import api

RATIOS = (1, 4, 8)
LENGTHS = ((1024, 2048), (4096, 1024))  # prompt and new tokens
SMALLER_BATCHES = (1, 8, 32, 128)
PAPER_BYTES = 80 * 10**9
_SAME = 1.1  # a device with less than so many times the paper's memory is measured with that alone


# ---- what is measured --------------------------------------------------------------------------


def plan_runs(setup: Setup, memories: dict[str, int], reserve: int, lengths, smaller) -> list[Run]:
    """What matters most first: the largest batches, then smaller ones.

    Args:
        setup: shared by all.
        memories: bytes, by name, the most important first.
        reserve: bytes of them for activations.
        lengths: prompt and new tokens.
        smaller: batches.
    """
    runs = {}  # by what is measured: a batch that was chosen twice is measured once
    for name, memory in memories.items():
        for prompt, new in lengths:
            for ratio in RATIOS:
                run = Run(prompt, new, ratio, 0, name)
                batch = largest_batch(setup, run, memory, reserve)
                if batch:
                    run = dataclasses.replace(run, batch=batch)
                    runs.setdefault((prompt, new, ratio, batch), run)
    largest = {}
    for prompt, new, ratio, batch in runs:
        largest[prompt, new, ratio] = max(batch, largest.get((prompt, new, ratio), 0))
    for batch in sorted(smaller, reverse=True):
        for (prompt, new, ratio), most in largest.items():
            if batch < most:
                run = Run(prompt, new, ratio, batch, None)
                runs.setdefault((prompt, new, ratio, batch), run)
    return list(runs.values())


def memories_of(device_bytes: int) -> dict[str, int]:
    """What batches shall fit into: the paper's memory where there is as much, and the whole."""
    memories = {"80 GB": PAPER_BYTES} if device_bytes >= PAPER_BYTES else {}
    if not memories or device_bytes > _SAME * PAPER_BYTES:
        memories["device"] = device_bytes
    return memories


def compare(results: list[dict]) -> list[dict]:
    """Largest batches against dense, at equal memory."""
    best = {
        (one["memory"], one["prompt"], one["new"], one["ratio"]): one
        for one in results
        if "tokens_per_second" in one and one["memory"]
    }
    found = []
    for (memory, prompt, new, ratio), one in best.items():
        dense = best.get((memory, prompt, new, 1))
        if ratio > 1 and dense:
            found.append(
                {
                    **{"memory": memory, "prompt": prompt, "new": new, "ratio": ratio},
                    "batch_over_dense": round(one["batch"] / dense["batch"], 2),
                    "tokens_per_second_over_dense": round(
                        one["tokens_per_second"] / dense["tokens_per_second"], 2
                    ),
                }
            )
    return found


def run_all(setup: Setup, runs: list[Run], report: dict, file: Path, until: float) -> None:
    """Measures in order; prints and writes what each gives.

    Args:
        setup: shared by all.
        runs: those whose results the report has are not measured again.
        report: gets `results`, `against_dense` and `left_out`.
        file: for the report.
        until: none is begun that might not be done by then, by `time.perf_counter`.
    """
    results, longest = report.setdefault("results", []), 0.0
    done = {Run(**{f.name: one[f.name] for f in dataclasses.fields(Run)}) for one in results}
    left = [run for run in runs if run not in done]
    print("prompt  new ratio batch memory   tokens/s  floors: weights   +cache   ms a step")
    report["against_dense"], report["left_out"] = compare(results), len(left)
    for run in left:
        started = time.perf_counter()
        if started + 1.2 * longest > until:
            break
        try:
            result = measure(setup, run)
        except Exception as error:  # above all that memory ran out; compilers have their own kinds
            result = vars(run) | {
                "failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]
            }
        results.append(result)
        _print_row(result)
        longest = max(longest, time.perf_counter() - started)
        report["against_dense"], report["left_out"] = compare(results), report["left_out"] - 1
        timing.write_json(file, report)
        plot(report, file.with_suffix(".png"))


def _print_row(result: dict) -> None:
    of_run = f"{result['prompt']:6} {result['new']:4} {result['ratio']:4}x {result['batch']:5}"
    if "failed" in result:
        print(of_run, f"{result['memory'] or '':7} failed: {result['failed']}", flush=True)
        return
    steps = " ".join(f"{point['milliseconds']:.2f}" for point in result["points"])
    print(
        f"{of_run} {result['memory'] or '':7} {result['tokens_per_second']:9.1f}",
        f"{result['floor_weights']:15.1f} {result['floor_weights_and_cache']:8.1f}   {steps}",
        flush=True,
    )


def plot(report: dict, file: Path) -> None:
    """Tokens a second against batch; dashed, what reading weights and cache alone would allow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [one for one in report["results"] if "tokens_per_second" in one]
    lengths = sorted({(one["prompt"], one["new"]) for one in results})
    if not lengths:
        return
    figure = Figure(figsize=(5 * len(lengths), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, length in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        for ratio, colour in zip(RATIOS, ("#8A8A8A", "#0072B2", "#D55E00"), strict=True):
            of = [x for x in results if (x["prompt"], x["new"], x["ratio"]) == (*length, ratio)]
            of.sort(key=lambda one: one["batch"])
            label = "dense" if ratio == 1 else f"{ratio}x"
            batches = [one["batch"] for one in of]
            axes.plot(
                batches, [x["tokens_per_second"] for x in of], "o-", color=colour, label=label
            )
            floor = [x["floor_weights_and_cache"] for x in of]
            axes.plot(batches, floor, "--", color=colour, linewidth=0.9)
        axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="tokens a second")
        axes.set_title(f"prompt {length[0]:,}, {length[1]:,} new tokens", fontsize=10)
        axes.grid(color="#E6E6E6")
        axes.legend(frameon=False)
    figure.suptitle(f"{report['model']}, {report['machine']['device']}", fontweight="bold")
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, writes the JSON file and the plot."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--page", type=int, default=16, help="slots of a page")
    parser.add_argument("--reserve", type=float, default=4e9, help="bytes for activations")
    parser.add_argument("--seconds", type=float, default=540, help="begin none that may end later")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--quick", action="store_true", help="short and few, on any device")
    parser.add_argument("--output", type=Path, help="benchmarks/<device>/end_to_end.json")
    options = parser.parse_args(arguments)
    until = time.perf_counter() + options.seconds
    # JAX takes three quarters of a GPU unless told otherwise before it first looks at one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    device = jax.local_devices()[0]
    if device.platform != "gpu" and not options.quick:
        parser.error(
            f"the benchmark needs a GPU that JAX sees, and it sees {device.device_kind}; "
            "try --quick --model=tiny"
        )
    name = "end_to_end_quick.json" if options.quick else "end_to_end.json"
    file = options.output or timing.result_file(name)
    rate = max(timing.copy_rates(2**22 if options.quick else 2**30).values())
    config = PRESETS[options.model]
    setup = Setup(config, random_params(config), options.page, 4 if options.quick else 16, rate)
    if options.quick:
        memories = {"5 MB": setup.weight_bytes + 5 * 10**6}
        runs = plan_runs(setup, memories, 0, ((48, 32),), ())
    else:
        memories = memories_of(device.memory_stats()["bytes_limit"])
        runs = plan_runs(setup, memories, int(options.reserve), LENGTHS, SMALLER_BATCHES)
    command = " ".join(["python -m benchmarks.end_to_end", *arguments])
    report = {
        "measures": __doc__,
        "machine": timing.machine(command),
        "model": options.model,
        "dtype": DTYPE,
        "implementations_that_run": [x for x in api.IMPLEMENTATIONS if not api.unavailable(x)],
        "page": options.page,
        "weight_bytes_a_step": setup.weight_bytes,
        "copy_bytes_per_second": rate,
        "memory_bytes": memories,
        "reserve_bytes": 0 if options.quick else options.reserve,
        "steps_timed_at_a_point": setup.steps,
    }
    if options.resume and file.exists():
        old = json.loads(file.read_text())
        if old["machine"]["device"] != report["machine"]["device"] or old["model"] != options.model:
            parser.error(f"--resume: {file} is of another device or model; take another --output")
        report["results"] = old["results"]
    print(f"{options.model} on {device.device_kind}; copy {rate / 1e9:.1f} GB/s")
    run_all(setup, runs, report, file, until)
    for one in report.get("against_dense", []):
        print(one)
    if report["left_out"]:
        print(f"{report['left_out']} left out for lack of time: --resume goes on")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
