"""Decode attention against the speed of memory, on one GPU.

    python -m pallas_kernels.bench --tune        # chooses settings for the kernels and keeps them
    python -m pallas_kernels.bench
    python -m pallas_kernels.bench --quick       # small sizes, on any device: whether it works

One decoding step of one layer: bfloat16, rows of even or very uneven lengths in pages of 16, 64 and
256 slots. Beside the implementations of `decode_attention` stand attentions over the same keys and
values padded to the longest row ("dense_xla": einsum and softmax; "dense_cudnn": JAX's call of
cuDNN, where it runs). Each is checked before it is timed: what its first call gives, which is one
of those timed, is compared with `reference` for the longest, the shortest and other rows; one that
is wrong gets no time. `timing` says how time is taken.

    useful bytes/s   keys and values of live slots, once, over the time of a call
    of copy          that over the bytes/s, read and written, of copying memory in the same run
    +plan            the same with the split of the rows made in every call; else it is made before,
                     as a decoding step makes it once for all its layers

The JSON file is written anew after every case: a run that is cut keeps what it has. What matters
most comes first, and no case is begun that might not end within --seconds.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target, timing, tuning
from pallas_kernels.bench.cases import DTYPE, MB, Case, make_pages
from pallas_kernels.bench.contenders import DENSE, Wrong, make_contender, measure
from pallas_kernels.bench.plot import plot
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention.settings import CANDIDATES, Settings, settings_for

SIZES = (8 * MB, 64 * MB, 256 * MB, 1024 * MB)
PAGES, WIDTHS, QUERIES = (16, 64, 256), (64, 128), (1, 4, 8)
_QUICK_COLD_BYTES = 2**20


# ---- what to time, what matters most first ----------------------------------------------------


def plan_cases(names: tuple[str, ...]) -> list[tuple[Case, tuple[str, ...]]]:
    """All cases with their contenders; of every case all pages, widths and G by the first name."""
    planned: dict[Case, tuple[str, ...]] = {}
    best, gpu = names[:1], tuple(name for name in names if name != "xla")
    both = "even", "uneven"
    for size, kind in itertools.product((256 * MB, 1024 * MB, 8 * MB, 64 * MB), both):
        xla = names[names.index("xla") :][:1] if "xla" in names and size == 256 * MB else ()
        planned[Case(kind, size, 64, 128, 1)] = (*gpu, f"{best[0]}+plan", *DENSE, *xla)
    for page, size, kind in itertools.product((16, 256), SIZES, both):
        planned.setdefault(Case(kind, size, page, 128, 1), gpu)
    planned[Case("empty", 8 * MB, 64, 128, 1)] = gpu
    for width, queries, kind in itertools.product(WIDTHS, QUERIES, both):
        planned.setdefault(Case(kind, 256 * MB, 64, width, queries), (*gpu, *DENSE))
    rest = itertools.product(SIZES, PAGES, WIDTHS, QUERIES, both)
    for size, page, width, queries, kind in rest:
        planned.setdefault(Case(kind, size, page, width, queries), best)
    return list(planned.items())


def quick_cases(names: tuple[str, ...]) -> list[tuple[Case, tuple[str, ...]]]:
    """A few small ones."""
    cases = [
        Case("even", MB // 4, 16, 64, 1),
        Case("uneven", MB // 4, 64, 64, 4),
        Case("empty", MB // 4, 16, 64, 1),
    ]
    return [(case, (*names, *DENSE) if case.lengths != "empty" else names) for case in cases]


def goals(results: list[dict]) -> dict[str, dict[str, float]]:
    """The figures to be judged by, of every implementation, H = 128 and G = 1."""
    found: dict[str, dict[str, float]] = {}
    times: dict[tuple, float] = {}
    for one in results:
        if "of_copy" not in one or (one["width"], one["queries"]) != (128, 1):
            continue
        of = found.setdefault(one["contender"], {})
        size, page, kind = one["live_bytes"], one["page"], one["lengths"]
        if size >= 256 * MB and kind != "empty":
            name = f"least_of_copy_page_{page}_from_256_MB"
            of[name] = min(of.get(name, np.inf), one["of_copy"])
            times[one["contender"], size, page, kind] = one["useful_bytes_per_second"]
        if size == 8 * MB and page == 64:
            of[f"microseconds_8_MB_{kind}" if kind != "empty" else "microseconds_empty"] = one[
                "microseconds"
            ]
    for (contender, size, page, kind), rate in times.items():
        even = times.get((contender, size, page, "even"))
        if kind == "uneven" and even and page == 64:
            name = f"uneven_over_even_rate_{size // MB}_MB"
            found[contender][name] = round(rate / even, 4)
    return found


# ---- settings ---------------------------------------------------------------------------------

_TUNED_ON = (
    Case("uneven", 256 * MB, 16, 128, 1),
    Case("uneven", 1024 * MB, 16, 128, 1),
    Case("even", 256 * MB, 16, 128, 1),
    Case("even", 8 * MB, 16, 128, 1),
)


def tune(
    rate: float,
    *,
    until: float,
    cases: tuple[Case, ...] = _TUNED_ON,
    candidates: tuple[Settings, ...] = CANDIDATES,
) -> tuple[Path, list[dict]]:
    """Time every candidate for the Triton kernel and keep the fastest settings of this device.

    Args:
        rate: bytes a second of copying.
        until: no candidate is tried after that, by `time.perf_counter`.
        cases: that count, all equally.
        candidates: to choose from. One that cannot be built or is wrong is passed over.

    Returns:
        (the file with the settings, what each candidate took).
    """
    kind, made = target.current().kind, {case: make_pages(case) for case in cases}
    tried = []

    def seconds(settings):
        rows = []
        for case, pages in made.items():
            try:
                if time.perf_counter() > until:
                    raise TimeoutError("no time left for it")
                contender = make_contender("triton", case, pages, settings=settings)
                row = measure(contender, case, pages, rate)
                rows.append({"contender": "triton", **vars(settings), **vars(case), **row})
            except Exception as error:  # compilers have errors of many kinds
                print(f"{settings}: passed over, {timing.in_a_line(error)}", flush=True)
                return [np.inf] * len(made)
        print(f"{settings}: {[row['of_copy'] for row in rows]} of copy", flush=True)
        tried.extend(rows)
        return [1e-6 * row["microseconds"] for row in rows]

    # Those in use first: they stay where no other is faster.
    used = settings_for(kind)
    best = tuning.fastest(seconds, (used, *(one for one in candidates if one != used)))
    source = timing.source("pallas_kernels.bench --tune")
    return tuning.save(kind, source, {"decode_attention": best}), tried


# ---- the run ----------------------------------------------------------------------------------


def run(
    cases: list[tuple[Case, tuple[str, ...]]],
    report: dict,
    file: Path,
    *,
    until: float,
    cold_bytes: int = timing.COLD_BYTES,
) -> bool:
    """Measure cases in order, and print and write what each gives.

    Args:
        cases: with the names of their contenders.
        report: gets `results`, and `left_out`: cases for which there was no time.
        file: for the report.
        until: no case is begun that might not be done by then, by `time.perf_counter`.
        cold_bytes: to read before the same again.

    Returns:
        Whether all implementations of `decode_attention` ran and were right.
    """
    results, longest, good = report.setdefault("results", []), 0.0, True
    rate = report["copy_bytes_per_second"]
    print(f"{'contender':14} lengths  live MB page   H G {'us':>10} {'GB/s':>8} of copy")
    for index, (case, names) in enumerate(cases):
        started = time.perf_counter()
        if started + 1.5 * longest > until:
            report["left_out"] = len(cases) - index
            break
        pages = make_pages(case, cold_bytes)
        for name in names:
            result = {"contender": name, **vars(case)}
            try:
                contender = make_contender(name, case, pages, cold_bytes)
                result |= measure(contender, case, pages, rate)
            except Wrong as error:
                result["wrong"] = str(error)
            except Exception as error:  # compilers have errors of many kinds
                result["failed"] = timing.in_a_line(error)
            contender = None  # padded keys and values may be ten times the live ones
            good &= name.startswith("dense") or "of_copy" in result
            results.append(result)
            _print_row(result)
        del pages
        longest = max(longest, time.perf_counter() - started)
        report["goals"] = goals(results)
        timing.write_json(file, report)
    return good


def _print_row(result: dict) -> None:
    of_case = f"{result['lengths']:7} {result['live_bytes'] / MB:8.1f} {result['page']:4}"
    of_case += f" {result['width']:3} {result['queries']}"
    if "of_copy" in result:
        rate = result["useful_bytes_per_second"] / 1e9
        what = f"{result['microseconds']:10.2f} {rate:8.1f} {result['of_copy']:7.1%}"
    else:
        what = f"wrong: {result['wrong']}" if "wrong" in result else f"failed: {result['failed']}"
    print(f"{result['contender']:14} {of_case} {what}", flush=True)


def _implementations(given: str | None) -> tuple[str, ...]:
    """The first is what `decode_attention` takes by itself, where that is among them.

    Raises:
        ValueError: a name that is not known or cannot run here.
    """
    if given is None:
        best = api.choose(None)
        others = set(api.IMPLEMENTATIONS.names) - {best, "reference"}
        return best, *sorted(name for name in others if api.unavailable(name) is None)
    names = tuple(given.split(","))
    for name in names:
        try:
            api.IMPLEMENTATIONS.load(name)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--implementations: {error}") from None
    return names


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 where an implementation failed or was wrong, 2 where it cannot be measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--tune", action="store_true", help="choose settings and keep them")
    parser.add_argument(
        "--seconds", type=float, default=540, help="begin no case that may end later"
    )
    parser.add_argument("--implementations", help="separated by commas; all that run here")
    parser.add_argument("--pages", help="slots of a page, separated by commas; only these cases")
    parser.add_argument(
        "--output", type=Path, help="benchmarks/<device>/kernels.json, or tuning.json"
    )
    options = parser.parse_args(arguments)
    until = time.perf_counter() + options.seconds
    if jax.default_backend() != "gpu" and (options.tune or not options.quick):
        wanted = "--tune" if options.tune else "the benchmark"
        device = jax.local_devices()[0].device_kind
        parser.error(f"{wanted} needs a GPU that JAX sees, and it sees {device}; try --quick alone")
    try:
        names = _implementations(options.implementations)
    except ValueError as error:
        parser.error(str(error))
    if options.tune and api.unavailable("triton") is not None:
        parser.error(f"--tune: the kernel cannot run here: {api.unavailable('triton')}")
    name = "tuning.json" if options.tune else "kernels.json"
    name = "kernels_quick.json" if options.quick else name
    file = options.output or timing.result_file(name)
    rates = timing.copy_rates(2**22 if options.quick else 2**30)
    rate = max(rates.values())
    command = " ".join(["python -m pallas_kernels.bench", *arguments])
    if options.tune:
        report = {"machine": timing.machine(command), "copy_bytes_per_second": rate}
        written, report["results"] = tune(rate, until=until)
        timing.write_json(file, report)
        print(f"wrote {written} and {file}")
        return 0
    report = {
        "measures": "decode attention of one layer, useful bytes/s against the rate of copying",
        "machine": timing.machine(command),
        "dtype": jnp.dtype(DTYPE).name,
        "copies_bytes_per_second": rates,
        "copy_bytes_per_second": rate,
    }
    where = report["machine"]
    print(f"{where['device']}, jax {where['packages']['jax']}; copy {rate / 1e9:.1f} GB/s")
    if "triton" in names:
        report["settings"] = vars(settings_for(target.current().kind))
    cases = (quick_cases if options.quick else plan_cases)(names)
    if options.pages:
        wanted = {int(page) for page in options.pages.split(",")}
        cases = [(case, contenders) for case, contenders in cases if case.page in wanted]
    cold_bytes = _QUICK_COLD_BYTES if options.quick else timing.COLD_BYTES
    good = run(cases, report, file, until=until, cold_bytes=cold_bytes)
    for name, figures in report.get("goals", {}).items():
        print(name, *(f"{what}: {value:g}" for what, value in figures.items()), sep="\n    ")
    if "left_out" in report:
        print(f"{report['left_out']} of {len(cases)} cases left out for lack of time")
    timing.write_json(file, report)
    plot(report, file.with_suffix(".png"))
    print(f"wrote {file}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
