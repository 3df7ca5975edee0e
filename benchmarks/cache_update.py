"""What a layer does to the cache when every sequence reads a token: XLA's form against the kernel.

    python -m benchmarks.cache_update                # --tune: keep the faster form for this device
    python -m benchmarks.cache_update --quick        # small sizes, on any device: whether it works

Timed is `decoding.read_token` as a decoding step calls it, with pages granted and settled once a
step. One compiled program makes the updates of many steps, each of as many layers as it takes for a
layer's rings to have left every cache before they are read again (`timing.COLD_BYTES`); the cache
is donated to it. Its wall time over its updates is the time of one. Before anything is timed, all
forms must give the same cache after such a program; one that does not gets no time.

Three tokens of four merge, at random, from segments of random lengths: rows differ as they do in
decoding at 4x. Heads are 128 wide, the window is 12 tokens, pages are bfloat16.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings, OpenSegment
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.inference import decoding, paged_cache
from dmc_jax.inference.paged_cache import PagedCache
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Tokens
from pallas_kernels import target, timing, tuning
from pallas_kernels.cache_update import api

ROWS = (32, 256, 2048)
HEADS, WIDTH, PAGE = 32, 128, 16
STEPS = 64
SETTINGS = DMCSettings(window=12)
POLICY = DMC(SETTINGS)
_MERGED, _DTYPE, _SAMPLES = 0.75, jnp.bfloat16, 5
_STARTS = 16  # slots that a row has at most when a program starts
# A bfloat16 key is rounded before its rotation and after it, each time by up to 2**-5 where numbers
# below 8, which all are, just round the other way.
_TOLERANCE = 2**-4


@dataclasses.dataclass(frozen=True)
class Case:
    """Updates of one layer.

    Attributes:
        rows: of the layer; up to 32 of them are KV heads of one sequence.
        layers: that take turns.
        steps: of a program.
    """

    rows: int
    layers: int
    steps: int

    @property
    def heads(self) -> int:
        """K."""
        return min(HEADS, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and rows of a sequence in all layers."""
        return self.rows // self.heads, self.heads * self.layers


class Read(NamedTuple):
    """What the sequences read: the same in every step but for the decisions."""

    q: Float[Array, "seats R H"]
    k: Float[Array, "seats R H"]
    v: Float[Array, "seats R H"]
    decisions: Float[Array, "steps seats R"]


def cases(rows: tuple[int, ...], *, cold_bytes: int, steps: int) -> list[Case]:
    """A case for every number of rows, with as many layers as keep them out of caches."""
    row_bytes = 2 * SETTINGS.window * WIDTH * jnp.dtype(_DTYPE).itemsize
    return [Case(n, timing.buffers_for(n * row_bytes, cold_bytes), steps) for n in rows]


@functools.partial(jax.jit, static_argnums=0)
def make(case: Case) -> tuple[PagedCache, Read]:
    """A cache in the middle of decoding, and what is read next."""
    seats, R = case.shape
    config = ModelConfig(
        vocab_size=2,
        width=2,
        layers=case.layers,
        heads=case.heads,
        kv_heads=case.heads,
        head_dim=WIDTH,
        mlp_width=2,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_length=2**15,
        tied_embeddings=True,
    )
    longest = _STARTS + case.steps
    rows = seats * R
    # The pool is common to all rows: they append a quarter of their tokens, and half would fit.
    pages = rows * paged_cache.pages_of(_STARTS + case.steps // 2, PAGE)
    cache = paged_cache.init(
        *(config, POLICY),
        seats=seats,
        pages=pages,
        page_size=PAGE,
        max_length=longest,
        dtype=_DTYPE,
        tokens=_DTYPE,
    )
    keys = iter(jax.random.split(jax.random.key(0), 12))
    lengths = jax.random.randint(next(keys), (seats, R), 1, _STARTS + 1)
    cache, _ = paged_cache.reserve(cache, lengths, most=paged_cache.pages_of(_STARTS, PAGE))
    # Segments as long as they come out when a token merges with that probability.
    uniform = jax.random.uniform(next(keys), (seats, R), minval=1e-6)
    count = 1 + jnp.floor(jnp.log(uniform) / math.log(_MERGED)).astype(jnp.int32)
    full = jnp.arange(SETTINGS.window) < count[..., None]
    ring = (seats, R, SETTINGS.window)
    k, v = (
        jnp.where(full[..., None], _normal(next(keys), (*ring, WIDTH)), 0).astype(_DTYPE)
        for _ in range(2)
    )
    cache = dataclasses.replace(
        cache,
        state=OpenSegment(k, v, jnp.where(full, _weights(next(keys), ring), 0), count),
        position=jnp.full(seats, 4096, jnp.int32),
    )
    q, k, v = (_normal(next(keys), (seats, R, WIDTH)).astype(_DTYPE) for _ in range(3))
    decisions = jax.random.bernoulli(next(keys), _MERGED, (case.steps, seats, R))
    return cache, Read(q, k, v, decisions.astype(jnp.float32))


def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.float32)


def _weights(key, shape):
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.0)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def program(cache: PagedCache, tokens: Read, case: Case, implementation: str) -> PagedCache:
    """All updates of some steps."""
    frequencies = rotary_frequencies(WIDTH, 10_000.0)
    active = jnp.ones(case.shape[0], bool)

    def step(i, cache):
        cache, reads, granted = decoding.begin_step(cache, active)

        # Not one after another in the program: that takes minutes to compile.
        def update(layer, cache):
            first = layer * case.heads
            now = tokens.q, tokens.k, tokens.v, tokens.decisions[i]
            q, k, v, decision = (paged_cache.take_rows(x, first, case.heads) for x in now)
            # The last channel decides.
            k = k.at[..., -1].set(jnp.where(decision > 0, 100, -100).astype(k.dtype))
            token = Tokens(q, k, v, cache.position, frequencies)
            return decoding.read_token(
                *(cache, POLICY, first, token), active=reads, implementation=implementation
            )[1]

        cache = jax.lax.fori_loop(0, case.layers, update, cache)
        return decoding.end_step(cache, active, granted)

    return jax.lax.fori_loop(0, case.steps, step, cache)


@jax.jit
def difference(cache: PagedCache, expected: PagedCache) -> dict[str, Array]:
    """The largest difference of every field, NaN where one of two is NaN."""

    def largest(x, y):
        return jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()

    def fields_of(cache):
        parts = {name: x for name, x in vars(cache).items() if name not in ("pages", "state")}
        parts |= vars(cache.state) | {f"{name}_pages": x for name, x in vars(cache.pages).items()}
        return {name: x for name, x in parts.items() if x is not None}

    others = fields_of(expected)
    return {name: largest(x, others[name]) for name, x in fields_of(cache).items()}


def measure(case: Case, implementation: str) -> dict:
    """Checks and times one form.

    Returns:
        Microseconds per update and its spread; or "wrong": in which field.
    """
    cache, tokens = make(case)
    after = program(cache, tokens, case, implementation)
    if implementation != api.XLA:
        found = jax.device_get(difference(after, program(*make(case), case, api.XLA)))
        # Not `> _TOLERANCE`: NaN must not pass.
        wrong = {name: float(x) for name, x in found.items() if not x <= _TOLERANCE}
        if wrong:
            return {"wrong": ", ".join(f"{name} is off by {x:.3g}" for name, x in wrong.items())}
    elif bool(after.failed.any()):
        return {"wrong": "some sequence ran out of pages"}
    seconds = []
    for _ in range(_SAMPLES):
        cache = jax.block_until_ready(make(case)[0])
        start = time.perf_counter()
        jax.block_until_ready(program(cache, tokens, case, implementation))
        seconds.append((time.perf_counter() - start) / (case.steps * case.layers))
    return {
        "microseconds": round(1e6 * statistics.median(seconds), 3),
        "least_and_greatest": [round(1e6 * x, 3) for x in (min(seconds), max(seconds))],
    }


def faster(results: list[dict], names: tuple[str, ...]) -> str:
    """The form with the least product of its times, of those that were right in every case."""

    def product(name):
        times = [one.get("microseconds", math.inf) for one in results if one["form"] == name]
        return sum(map(math.log, times))

    return min(names, key=product)


def run(names: tuple[str, ...], planned: list[Case], report: dict, file: Path) -> bool:
    """Measures all, prints a table and writes the report after every case.

    Returns:
        Whether all forms ran and were right.
    """
    results = report.setdefault("results", [])
    print(f"{'rows':>5} {'layers':>6}  " + " ".join(f"{name:>10}" for name in names) + "   us")
    for case in planned:
        row = []
        for name in names:
            try:
                result = measure(case, name)
            except Exception as error:  # compilers have errors of many kinds
                result = {"failed": timing.in_a_line(error)}
            results.append({"form": name, **dataclasses.asdict(case), **result})
            row.append(result)
        times = (f"{one.get('microseconds', math.nan):10.2f}" for one in row)
        print(f"{case.rows:5} {case.layers:6}  " + " ".join(times), flush=True)
        for name, one in zip(names, row, strict=True):
            if "microseconds" not in one:
                print(f"    {name}: {one}")
        report["faster"] = faster(results, names)
        timing.write_json(file, report)
    print(f"faster: {report['faster']}")
    return all("microseconds" in one for one in results)


def main(arguments: list[str] | None = None) -> int:
    """Measures; 1 where a form failed or was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--tune", action="store_true", help="keep the faster form for this device")
    parser.add_argument("--output", type=Path, help="benchmarks/<device>/cache_update.json")
    options = parser.parse_args(arguments)
    if options.quick and options.tune:
        parser.error("--tune: small sizes do not tell which form is faster; leave out --quick")
    if jax.default_backend() != "gpu" and not options.quick:
        device = jax.local_devices()[0].device_kind
        parser.error(f"it needs a GPU that JAX sees, and it sees {device}; try --quick")
    name = "cache_update_quick.json" if options.quick else "cache_update.json"
    file = options.output or timing.result_file(name)
    names = [api.XLA]
    reason = api.unavailable("triton")
    if reason is None:
        names.append("triton")
    else:
        print(f"without the kernel: {reason}")
    report = {
        "measures": "read_token of one layer, microseconds",
        "machine": timing.machine(" ".join(["python -m benchmarks.cache_update", *arguments])),
        "window": SETTINGS.window,
        "width": WIDTH,
        "page": PAGE,
        "dtype": jnp.dtype(_DTYPE).name,
        "merged": _MERGED,
    }
    if options.quick:
        planned = cases((4, 64), cold_bytes=2**17, steps=8)
    else:
        planned = cases(ROWS, cold_bytes=timing.COLD_BYTES, steps=STEPS)
    good = run(tuple(names), planned, report, file)
    if options.tune:
        source = timing.source("benchmarks.cache_update --tune")
        kept = tuning.save(target.current().kind, source, {"cache_update": report["faster"]})
        print(f"wrote {kept}")
    print(f"wrote {file}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
