"""Training attention on one GPU, forward and backward, against the rate of matrix products.

    python -m benchmarks.training_attention --tune    # chooses the kernels' blocks and keeps them
    python -m benchmarks.training_attention
    python -m benchmarks.training_attention --quick   # small sizes, any device: whether it works

"xla" is the chunked form of `core.attention`, "triton" the kernels of
`pallas_kernels.causal_attention`, both with the key bias and the open diagonal of DMC; "cudnn" is
JAX's call of cuDNN, which can do neither: what attention without them takes. All in bfloat16.

Each is checked before it is timed: outputs and gradients for one sequence of at most 1,024 tokens
against `reference`. One that is wrong gets no time. `timing` says how time is taken: calls are
chained, so a gradient is timed together with adding a little of it to what it is of.

    flop/s          two products of the visible pairs forward, 4 H flop a pair and head, and five
                    backward, over the time of a call; what is computed and masked does not count
    of matrix rate  that over the flop/s of a large bfloat16 product in the same run
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dmc_jax.core.attention import causal_attention as chunked
from pallas_kernels import target, timing, tuning
from pallas_kernels.causal_attention import reference
from pallas_kernels.causal_attention import settings as blocks_module
from pallas_kernels.triton_call import unavailable

TOLERANCE = 0.02  # of the Euclidean norm; bfloat16 is off by 2**-8 at each of a few steps
_CHECKED_TOKENS = 1024
_STEP = 2.0**-10
_DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one layer."""

    length: int
    heads: int
    kv_heads: int
    width: int
    batch: int

    @property
    def pair_flop(self) -> int:
        """Of one product over all visible pairs."""
        return self.batch * self.heads * self.length * (self.length + 1) * self.width


CASES = (
    Case(4096, 32, 32, 128, 4),  # Llama 2 7B; the one to be judged by
    Case(4096, 32, 8, 128, 4),  # Llama 3 8B
    Case(1024, 32, 32, 128, 16),
    Case(16384, 32, 8, 128, 1),
    Case(4096, 32, 8, 64, 4),
)
QUICK = (Case(96, 2, 1, 16, 1),)


def contenders() -> dict[str, Callable]:
    """Those that may run here, by name: attend(q, k, v, key_bias, scale=...)."""
    found = {"xla": chunked}
    if unavailable() is None:
        found["triton"] = _kernels()
    if target.current().platform == "gpu":
        found["cudnn"] = _cudnn
    return found


def _kernels() -> Callable:
    from pallas_kernels.causal_attention.triton import causal_attention

    return causal_attention


def _cudnn(q, k, v, key_bias, *, scale):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )


# ---- check -------------------------------------------------------------------------------------


def make_inputs(case: Case, dtype: Any = _DTYPE) -> tuple[tuple, jax.Array]:
    """(q, k, v, key_bias) and a cotangent; three keys of four are all but superseded, as at 4x."""
    keys = jax.random.split(jax.random.key(0), 5)
    of_queries = (case.batch, case.length, case.heads, case.width)
    of_keys = (case.batch, case.length, case.kv_heads, case.width)
    q, d_out = (jax.random.normal(key, of_queries, dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, of_keys, dtype) for key in keys[2:4])
    superseded = jax.random.bernoulli(keys[4], 0.75, of_keys[:3])
    return (q, k, v, jnp.where(superseded, -20.0, -0.01)), d_out


def gradients(attend: Callable, inputs: tuple, d_out: jax.Array, scale: float) -> tuple:
    """Outputs and the gradients for all inputs."""
    out, pullback = jax.vjp(lambda *x: attend(*x, scale=scale), *inputs)
    return out, *pullback(d_out)


_gradients = jax.jit(gradients, static_argnums=(0, 3))


def largest_error(attend: Callable, case: Case, *, biased: bool) -> float:
    """Relative error of the worst of outputs and gradients."""
    small = dataclasses.replace(case, length=min(case.length, _CHECKED_TOKENS), batch=1)
    inputs, d_out, expected = _checked_by(small, biased)
    got = _gradients(attend, inputs, d_out, small.width**-0.5)
    pairs = list(zip(got, expected, strict=True))
    return max(_relative(*pair) for pair in (pairs if biased else pairs[:4]))


@functools.lru_cache(maxsize=2)
def _checked_by(case: Case, biased: bool) -> tuple[tuple, jax.Array, tuple]:
    """Inputs, a cotangent, and what the reference makes of them: the same for all contenders."""
    inputs, d_out = make_inputs(case)
    if not biased:
        inputs = *inputs[:3], jnp.zeros_like(inputs[3])
    scale = case.width**-0.5
    return inputs, d_out, _gradients(reference.causal_attention, inputs, d_out, scale)


def _relative(got: jax.Array, expected: jax.Array) -> float:
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


# ---- time --------------------------------------------------------------------------------------


def matrix_rate(size: int) -> float:
    """Flop a second of a product of square bfloat16 matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), _DTYPE)

    def multiply(x, shared, other):
        return (x @ other) * _DTYPE(size**-0.5)

    _, taken = timing.time_chain(multiply, x, None, [x], expected=2 * size**3 / 1e15)
    return 2 * size**3 / taken.median


def seconds(attend: Callable, case: Case, rate: float, *, backward: bool) -> timing.Timing:
    """Times a call: the output, or output and gradients.

    Args:
        attend: of `contenders`.
        case: sizes.
        rate: flop/s of matrices, to guess how long it takes.
        backward: whether gradients are wanted.
    """
    inputs, d_out = make_inputs(case)
    scale = case.width**-0.5
    q, *others = inputs

    def forward(q, others, _):
        return attend(q, *others, scale=scale)

    def both(inputs, d_out, _):
        found = gradients(attend, inputs, d_out, scale)[1:]
        return tuple(x + (_STEP * d).astype(x.dtype) for x, d in zip(inputs, found, strict=True))

    expected = (7 if backward else 2) * case.pair_flop / rate
    if backward:
        return timing.time_chain(both, inputs, d_out, [None], expected=expected)[1]
    return timing.time_chain(forward, q, others, [None], expected=expected)[1]


def measure(name: str, attend: Callable, case: Case, rate: float) -> dict:
    """Checks a contender, and times it where it is right."""
    error = largest_error(attend, case, biased=name != "cudnn")
    result = {"contender": name, **vars(case), "relative_error": error}
    if not error <= TOLERANCE:  # NaN must not pass
        return result | {"wrong": f"relative error {error:.3g}, expected at most {TOLERANCE:g}"}
    for what, backward, products in (("forward", False, 2), ("forward_and_backward", True, 7)):
        taken = seconds(attend, case, rate, backward=backward)
        flop_rate = products * case.pair_flop / taken.median
        result[what] = {
            "milliseconds": round(1e3 * taken.median, 4),
            "least_and_greatest": [round(1e3 * x, 4) for x in (taken.least, taken.greatest)],
            "calls": taken.calls,
            "flop_per_second": flop_rate,
            "of_matrix_rate": round(flop_rate / rate, 4),
        }
    return result


def run(cases: tuple[Case, ...], report: dict, file: Path, until: float) -> bool:
    """Measures cases in order, prints and writes each; whether all that ran was right."""
    rate, results, good, longest = report["matrix_flop_per_second"], [], True, 0.0
    report["results"] = results
    print(f"{'':8}    T   N   K   H   {'forward':>22}   {'forward and backward':>22}")
    for index, case in enumerate(cases):
        started = time.perf_counter()
        if started + 1.5 * longest > until:
            report["left_out"] = len(cases) - index
            break
        for name, attend in contenders().items():
            try:
                result = measure(name, attend, case, rate)
            except Exception as error:  # compilers have errors of many kinds
                result = {"contender": name, **vars(case), "failed": timing.in_a_line(error)}
            good &= "forward" in result or name == "cudnn"
            results.append(result)
            _print_row(result)
        longest = max(longest, time.perf_counter() - started)
        timing.write_json(file, report)
    return good


def _print_row(result: dict) -> None:
    sizes = " ".join(f"{result[x]:4}" for x in ("length", "heads", "kv_heads", "width"))
    if "forward" not in result:
        what = f"wrong: {result['wrong']}" if "wrong" in result else f"failed: {result['failed']}"
    else:
        what = "   ".join(
            f"{result[x]['milliseconds']:10.3f} ms {result[x]['of_matrix_rate']:8.1%}"
            for x in ("forward", "forward_and_backward")
        )
    print(f"{result['contender']:8} {sizes}   {what}", flush=True)


# ---- settings ----------------------------------------------------------------------------------


def tune(case: Case, rate: float, until: float) -> Path:
    """Times every candidate of every kernel and keeps the fastest blocks of this device."""
    kind = target.current().kind
    chosen = blocks_module.settings_for(kind)
    for kernel, candidates in blocks_module.CANDIDATES.items():

        def times(blocks, kernel=kernel, others=chosen):
            settings = dataclasses.replace(others, **{kernel: blocks})
            attend = functools.partial(_kernels(), settings=settings)
            try:
                if time.perf_counter() > until:
                    raise TimeoutError("no time left for it")
                error = largest_error(attend, case, biased=True)
                if not error <= TOLERANCE:
                    raise ArithmeticError(f"relative error {error:.3g}")
                taken = seconds(attend, case, rate, backward=kernel != "forward").median
            except Exception as error:  # compilers have errors of many kinds
                print(f"{kernel} {blocks}: passed over, {timing.in_a_line(error)}", flush=True)
                return [float("inf")]
            print(f"{kernel} {blocks}: {1e3 * taken:.3f} ms", flush=True)
            return [taken]

        # Those in use first: they stay where no other is faster.
        used = getattr(chosen, kernel)
        best = tuning.fastest(times, (used, *(one for one in candidates if one != used)))
        chosen = dataclasses.replace(chosen, **{kernel: best})
        source = timing.source("benchmarks.training_attention --tune")
        tuning.save(kind, source, {"causal_attention": chosen})
    return tuning.file_of(kind)


def main(arguments: list[str] | None = None) -> int:
    """Measures; 1 where something was wrong or failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--tune", action="store_true", help="choose blocks and keep them")
    parser.add_argument("--seconds", type=float, default=540, help="begin none that may end later")
    parser.add_argument("--output", type=Path, help="benchmarks/<device>/training_attention.json")
    options = parser.parse_args(arguments)
    until = time.perf_counter() + options.seconds
    device = jax.local_devices()[0]
    if device.platform != "gpu" and (options.tune or not options.quick):
        wanted = "--tune" if options.tune else "the benchmark"
        kind = device.device_kind
        parser.error(f"{wanted} needs a GPU that JAX sees, and it sees {kind}; try --quick alone")
    if options.tune and unavailable() is not None:
        parser.error(f"--tune: the kernels cannot run here: {unavailable()}")
    name = "training_attention_quick.json" if options.quick else "training_attention.json"
    file = options.output or timing.result_file(name)
    rate = matrix_rate(256 if options.quick else 8192)
    print(f"{device.device_kind}, jax {jax.__version__}; matrices {rate / 1e12:.4g} Tflop/s")
    if options.tune:
        print(f"wrote {tune(CASES[0], rate, until)}")
        return 0
    report = {
        "measures": "attention of one training layer, flop/s against those of matrix products",
        "machine": timing.machine(
            " ".join(["python -m benchmarks.training_attention", *arguments])
        ),
        "dtype": jnp.dtype(_DTYPE).name,
        "settings": dataclasses.asdict(blocks_module.settings_for(target.current().kind)),
        "matrix_flop_per_second": rate,
    }
    good = run(QUICK if options.quick else CASES, report, file, until)
    timing.write_json(file, report)
    print(f"wrote {file}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
