"""Reading a prompt on a GPU: the kernel of attention over pages by its settings, prompts by chunk.

    python -m benchmarks.prefill_attention                      # --tune: keep the fastest settings
    python -m benchmarks.prefill_attention --quick --model=tiny # on any device: whether it works

The kernel reads 512 tokens of a sequence with 3,584 slots before them, dense, in bfloat16 and pages
of 16 slots. Prompts of 1,024 and 4,096 tokens are read by `inference.prefill` as the engine does,
one at a time into an empty seat, dense and by a model with random weights that merges most tokens
(how many is in the file). Calls of the kernel are chained (`timing`); prompts are read three times.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.end_to_end_step import DTYPE, Run, Setup, policy_of, prefill_times, random_params
from dmc_jax.model.presets import PRESETS
from pallas_kernels import target, timing, tuning
from pallas_kernels.prefill_attention.settings import CANDIDATES, Settings, settings_for

_HEADS, _WIDTH, _PAGE, _TOKENS, _BEFORE = 32, 128, 16, 512, 3584
_CHUNKS, _PROMPTS, _MERGING = (512, 1024), (1024, 4096), -1.47


def kernel_time(settings: Settings) -> dict:
    """Times the kernel with some settings; or says why it cannot run."""
    from pallas_kernels.prefill_attention.triton import prefill_attention

    shape, slots = (1, _TOKENS, _HEADS, _WIDTH), _BEFORE + _TOKENS
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, shape, DTYPE) for key in keys[:3])
    pages = _HEADS * slots // _PAGE
    pool = tuple(jax.random.normal(key, (pages, _PAGE, _WIDTH), DTYPE) for key in keys[3:])
    table = np.random.default_rng(0).permutation(pages).reshape(1, _HEADS, -1)
    slot = jnp.broadcast_to(_BEFORE + jnp.arange(_TOKENS), (1, _HEADS, _TOKENS))
    others = jnp.asarray(table, jnp.int32), jnp.full((1, _HEADS), slots, jnp.int32)
    flop = 4 * _HEADS * _WIDTH * sum(range(_BEFORE, slots))

    def call(q, _, pool):
        return prefill_attention(
            *(q, k, v, slot.astype(jnp.int32), *pool, *others, jnp.zeros(1, jnp.int32)),
            first=jnp.int32(0),
            scale=_WIDTH**-0.5,
            settings=settings,
        )

    try:
        _, taken = timing.time_chain(call, q, None, [pool], expected=flop / 3e14)
    except Exception as error:  # compilers have errors of many kinds
        return dataclasses.asdict(settings) | {"failed": timing.in_a_line(error)}
    return dataclasses.asdict(settings) | {
        "microseconds": round(1e6 * taken.median, 2),
        "least_and_greatest": [round(1e6 * x, 2) for x in (taken.least, taken.greatest)],
        "flop_per_second": flop / taken.median,
    }


def prompt_times(setup: Setup, prompts: tuple[int, ...]) -> list[dict]:
    """Times reading prompts, for every chunk, dense and merging."""
    found = []
    for tokens in prompts:
        for ratio in (1, 8):
            policy = policy_of(Run(tokens, 0, ratio, 1, None))
            if ratio > 1:
                policy = dataclasses.replace(policy, threshold=jnp.float32(_MERGING))
            for chunk in _CHUNKS:
                taken, slots = prefill_times(setup, tokens, policy, chunk=chunk)
                found.append(
                    {
                        "tokens": tokens,
                        "policy": policy.name,
                        "chunk": chunk,
                        "slots_a_row": round(slots, 1),
                        "milliseconds": [round(1e3 * x, 2) for x in sorted(taken)],
                    }
                )
                print(found[-1], flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes the JSON file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--tune", action="store_true", help="keep the fastest settings")
    parser.add_argument("--quick", action="store_true", help="one short prompt, on any device")
    parser.add_argument("--output", type=Path, help="benchmarks/<device>/prefill_attention.json")
    options = parser.parse_args(arguments)
    device = jax.local_devices()[0]
    if device.platform != "gpu" and not options.quick:
        parser.error(f"it needs a GPU that JAX sees, and it sees {device.device_kind}; try --quick")
    name = "prefill_attention_quick.json" if options.quick else "prefill_attention.json"
    file = options.output or timing.result_file(name)
    command = " ".join(["python -m benchmarks.prefill_attention", *arguments])
    report = {"measures": __doc__.splitlines()[0], "machine": timing.machine(command)}
    if device.platform == "gpu":
        report["settings"] = [kernel_time(settings) for settings in CANDIDATES]
        print(*report["settings"], sep="\n", flush=True)
        timing.write_json(file, report)
        if options.tune:
            timed = [one for one in report["settings"] if "microseconds" in one]
            best = min(timed, key=lambda one: one["microseconds"])
            fields = dataclasses.fields(Settings)
            kept = Settings(**{field.name: best[field.name] for field in fields})
            source = timing.source("benchmarks.prefill_attention --tune")
            print(tuning.save(target.current().kind, source, {"prefill_attention": kept}))
        report["used"] = dataclasses.asdict(settings_for(target.current().kind))
    config = PRESETS[options.model]
    setup = Setup(config, random_params(config), _PAGE, 0, 1.0)
    report["prompts"] = prompt_times(setup, (100,) if options.quick else _PROMPTS)
    timing.write_json(file, report)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
