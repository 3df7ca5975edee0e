"""Tokens a second of a 7B model on one GPU, against batch size: dense, 4x and 8x.

    python -m benchmarks.end_to_end                              # --resume goes on after a cut
    python -m benchmarks.end_to_end --quick --model=tiny         # on any device: whether it works
    python -m benchmarks.end_to_end --kv_dtype=int8              # pages of int8, another file
    python -m benchmarks.end_to_end --compile 2/8                # only fills JAX's program cache

What is timed is the engine's own step, `inference.programs.next_tokens`: forward pass, merging or
appending, pages, attention, the most likely token. Left out: the host's
bookkeeping between steps, waiting for a place; and the prompts, but for the figures "with prefill":
there the prompts of the largest batch are read first, one after the other, as the engine does.

The weights are random, made on the device in bfloat16 a matrix at a time. What they would decide
says nothing of a trained model, so rows are given the lengths that they would have in one. The demo
measured the ratio of every layer and KV head of a model trained for 4x (`head_ratios.json`, 16 of
them, 1.3x to 18x). Every layer here gets these heads' slots per token, as often as it takes, in
random order, scaled so that their mean is one over the ratio asked for (for 8x: half of what was
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
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import jax

from benchmarks.end_to_end_step import (
    DTYPE,
    Run,
    Setup,
    compile_step,
    largest_batch,
    measure,
    random_params,
)
from dmc_jax.model.presets import PRESETS
from pallas_kernels import timing
from pallas_kernels.decode_attention import api

RATIOS = (1, 4, 8)
LENGTHS = ((1024, 2048), (4096, 1024))  # prompt and new tokens
SMALLER_BATCHES = (1, 8, 32, 128)
PAPER_BYTES = 80 * 10**9
# Products of matrices take batches in tiles of so many. A batch that is rounded down to whole ones
# is measured too, where that costs little of it.
_TILE, _LITTLE = 64, 0.08
# What JAX may take of a device differs by what else runs. Rounded, the batches do not.
_GRAIN = 8 * 10**9
_SAME = 1.1  # a device with less than so many times the paper's memory is measured with that alone


# ---- what is measured --------------------------------------------------------------------------


def plan_runs(setup: Setup, memories: dict[str, int], reserve: int, lengths, smaller) -> list[Run]:
    """What matters most first: the largest batches, one sequence, dense's batch, then others.

    Args:
        setup: shared by all.
        memories: bytes, by name, the most important first.
        reserve: bytes of them for activations.
        lengths: prompt and new tokens.
        smaller: batches, the most important first.
    """
    runs = {}  # by what is measured: a batch that was chosen twice is measured once

    def add(run: Run) -> None:
        runs.setdefault((run.prompt, run.new, run.ratio, run.batch), run)

    dense = {}  # the largest batch by lengths and memory
    for index, (name, memory) in enumerate(memories.items()):
        for prompt, new in lengths:
            for ratio in RATIOS:
                run = Run(prompt, new, ratio, 0, name)
                batch = largest_batch(setup, run, memory, reserve)
                tiles = batch // _TILE * _TILE
                for size in (batch, tiles) if tiles >= (1 - _LITTLE) * batch else (batch,):
                    if size:
                        add(dataclasses.replace(run, batch=size))
                if ratio == 1:
                    dense[prompt, new, name] = batch
        if index == 0:  # the paper's: alone, and as many sequences as fit without compression
            for (prompt, new), ratio in itertools.product(lengths, RATIOS):
                for batch in (*smaller[:1], dense[prompt, new, name]):
                    if batch:
                        add(Run(prompt, new, ratio, batch, None))
    most = {}
    for prompt, new, ratio, batch in runs:
        most[prompt, new, ratio] = max(batch, most.get((prompt, new, ratio), 0))
    for batch in smaller[1:]:
        for (prompt, new, ratio), largest in most.items():
            if batch < largest:
                add(Run(prompt, new, ratio, batch, None))
    return list(runs.values())


def memories_of(device_bytes: int) -> dict[str, int]:
    """What batches shall fit into: the paper's memory where there is as much, and the whole."""
    memories = {"80 GB": PAPER_BYTES} if device_bytes >= PAPER_BYTES else {}
    if not memories or device_bytes > _SAME * PAPER_BYTES:
        memories["device"] = device_bytes // _GRAIN * _GRAIN
    return memories


def largest(results: list[dict]) -> dict[tuple, dict]:
    """The fastest of the largest batches, by memory, prompt, new tokens and ratio."""
    best: dict[tuple, dict] = {}
    for one in results:
        if "tokens_per_second" in one and one["memory"]:
            key = one["memory"], one["prompt"], one["new"], one["ratio"]
            best[key] = max(one, best.get(key, one), key=lambda x: x["tokens_per_second"])
    return best


def compare(results: list[dict]) -> list[dict]:
    """The largest batches against dense's, at equal memory."""
    best, found = largest(results), []
    for (memory, prompt, new, ratio), one in best.items():
        dense = best.get((memory, prompt, new, 1))
        if ratio > 1 and dense:
            found.append(
                {
                    **{"memory": memory, "prompt": prompt, "new": new, "ratio": ratio},
                    "batch_over_dense": round(one["batch"] / dense["batch"], 2),
                }
                | {
                    f"{name}_over_dense": round(one[name] / dense[name], 2)
                    for name in ("tokens_per_second", "tokens_per_second_with_prefill")
                    if name in one and name in dense
                }
            )
    return found


def add_costs(results: list[dict], dollars_per_hour: float | None) -> None:
    """Adds what a million new tokens cost, of the rows whose prompts were read too with these."""
    for one in results:
        for name in ("tokens_per_second", "tokens_per_second_with_prefill"):
            if dollars_per_hour and name in one:
                cost = dollars_per_hour * 1e6 / (3600 * one[name])
                one[name.replace("tokens_per_second", "dollars_per_million")] = round(cost, 4)


def run_all(
    setup: Setup,
    runs: list[Run],
    report: dict,
    file: Path,
    until: float,
    dollars_per_hour: float | None = None,
) -> None:
    """Measures in order; prints and writes what each gives.

    Args:
        setup: shared by all.
        runs: those whose results the report has are not measured again.
        report: gets `results`, `against_dense` and `left_out`.
        file: for the report.
        until: none is begun that might not be done by then, by `time.perf_counter`.
        dollars_per_hour: of the device; None leaves costs out.
    """
    results, longest = report.setdefault("results", []), 0.0
    done = {Run(**{f.name: one[f.name] for f in dataclasses.fields(Run)}) for one in results}
    left = [run for run in runs if run not in done]
    add_costs(results, dollars_per_hour)
    print(
        "prompt  new ratio batch memory   tokens/s  with prefill  floors: weights   +cache"
        f"   {'$/M tokens  ' if dollars_per_hour else ''}ms a step"
    )
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
        add_costs(results, dollars_per_hour)
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
    cost = f"{result['dollars_per_million']:10.3f}  " if "dollars_per_million" in result else ""
    print(
        f"{of_run} {result['memory'] or '':7} {result['tokens_per_second']:9.1f}",
        f"{result.get('tokens_per_second_with_prefill', ''):>13}",
        f"{result['floor_weights']:16.1f} {result['floor_weights_and_cache']:8.1f}   {cost}{steps}",
        flush=True,
    )


def plot(report: dict, file: Path) -> None:
    """Tokens a second at equal memory, and how many times dense's that is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = largest(report["results"])
    shown = next(iter(best), None)
    if shown is None:
        return
    lengths = sorted({(prompt, new) for memory, prompt, new, _ in best if memory == shown[0]})
    figure = Figure(figsize=(4 * len(lengths), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, length in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True
    ):
        dense = best.get((shown[0], *length, 1))
        for at, (ratio, colour) in enumerate(
            zip(RATIOS, ("#8A8A8A", "#0072B2", "#D55E00"), strict=True)
        ):
            one = best.get((shown[0], *length, ratio))
            if one is None:
                continue
            speed = one["tokens_per_second"]
            bar = axes.bar(at, speed, 0.7, color=colour)
            more = f"{speed / dense['tokens_per_second']:.1f}x\n" if dense else ""
            axes.bar_label(bar, [f"{more}{speed:,.0f}\n{one['batch']} sequences"], padding=3)
        axes.set_xticks(range(len(RATIOS)), ["dense", *(f"DMC {ratio}x" for ratio in RATIOS[1:])])
        axes.set_title(f"prompt {length[0]:,}, {length[1]:,} new tokens", fontsize=10)
        axes.set_ylabel("new tokens a second")
        axes.margins(y=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    what = f"{report['model']} shape on one {report['machine']['device']}, {shown[0]} for each"
    figure.suptitle(f"{what}; decoding, random weights", fontsize=11)
    figure.savefig(file)


def compile_runs(setup: Setup, runs: list[Run], until: float) -> None:
    """Compiles the programs of some runs, for JAX's compilation cache; begins none after `until`.

    Most of a measurement is compilation, which several processes can do at a time.
    """
    for run in runs:
        if time.perf_counter() < until:
            started = time.perf_counter()
            compile_step(setup, run)
            seconds = time.perf_counter() - started
            print(f"{run.prompt} {run.new} {run.ratio}x {run.batch}: compiled in {seconds:.1f} s")


def _planned(setup: Setup, options, device: jax.Device) -> tuple[dict[str, int], list[Run]]:
    """Memories by name, and what is measured."""
    if options.quick:
        memories = {"5 MB": setup.weight_bytes + 5 * 10**6}
        return memories, plan_runs(setup, memories, 0, ((48, 32),), ())
    memories = memories_of(device.memory_stats()["bytes_limit"])
    return memories, plan_runs(setup, memories, int(options.reserve), LENGTHS, SMALLER_BATCHES)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, writes the JSON file and the plot."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--page", type=int, default=16, help="slots of a page")
    parser.add_argument("--kv_dtype", default=DTYPE, choices=(DTYPE, "int8"), help="of pages")
    parser.add_argument("--reserve", type=float, default=4e9, help="bytes for activations")
    parser.add_argument("--dollars-per-hour", type=float, help="adds dollars a million new tokens")
    parser.add_argument("--seconds", type=float, default=540, help="begin none that may end later")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument(
        "--compile", metavar="I/N", help="measure nothing: compile every N-th, from the I-th"
    )
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
    name = "end_to_end" if options.kv_dtype == DTYPE else f"end_to_end_{options.kv_dtype}"
    name = f"{name}_quick.json" if options.quick else f"{name}.json"
    file = options.output or timing.result_file(name)
    config, steps = PRESETS[options.model], 4 if options.quick else 16
    make = functools.partial(
        Setup, config, page=options.page, steps=steps, kv_dtype=options.kv_dtype
    )
    if options.compile:
        setup = make(jax.eval_shape(random_params, config), rate=1.0)
        part, parts = map(int, options.compile.split("/"))
        return compile_runs(setup, _planned(setup, options, device)[1][part::parts], until)
    rate = max(timing.copy_rates(2**22 if options.quick else 2**30).values())
    setup = make(random_params(config), rate=rate)
    memories, runs = _planned(setup, options, device)
    command = " ".join(["python -m benchmarks.end_to_end", *arguments])
    report = {
        "measures": __doc__,
        "machine": timing.machine(command),
        "model": options.model,
        "dtype": DTYPE,
        "kv_dtype": options.kv_dtype,
        "implementations_that_run": [
            x for x in api.IMPLEMENTATIONS.names if not api.unavailable(x)
        ],
        "page": options.page,
        "weight_bytes_a_step": setup.weight_bytes,
        "copy_bytes_per_second": rate,
        "memory_bytes": memories,
        "reserve_bytes": 0 if options.quick else options.reserve,
        "steps_timed_at_a_point": setup.steps,
    }
    if options.resume and file.exists():
        old = json.loads(file.read_text())
        theirs = old["machine"]["device"], old["model"], old.get("kv_dtype", DTYPE)
        if theirs != (report["machine"]["device"], options.model, options.kv_dtype):
            parser.error(
                f"--resume: {file} is of another device, model or kv_dtype; take another --output"
            )
        report["results"] = old["results"]
    print(f"{options.model} on {device.device_kind}; copy {rate / 1e9:.1f} GB/s")
    run_all(setup, runs, report, file, until, options.dollars_per_hour)
    for one in report.get("against_dense", []):
        print(one)
    if report["left_out"]:
        print(f"{report['left_out']} left out for lack of time: --resume goes on")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
