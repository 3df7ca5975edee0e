"""What pages of int8 cost and give beside pages of float32, in one run.

    python -m benchmarks.int8_pages                                        # attention, and serving
    python -m benchmarks.int8_pages --parts=quality --checkpoint=MODEL --data=DIR,DIR --gates=FILE

    attention  decode attention over keys and values that are normal: how far off each
               implementation that runs here is from the reference over the float32 numbers, root
               mean square over that of the output. Beside it pages of bfloat16.
    quality    a model with pages of either kind, on windows of held-out text, dense and with gates
               at several ratios: perplexity against the dense model in float32, and divergence
               from it.
    serving    sequences in the cache and new tokens a second at equal bytes of cache, dense and at
               4x, on random weights, as in `benchmarks.throughput`.

A GPU with bfloat16 pages beside int8: `python -m benchmarks.end_to_end --kv_dtype=int8`. A second
run with the same output keeps the parts that it does not take anew.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_model, throughput
from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import open_model
from dmc_jax.core.attention import causal_attention
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.side_by_side import joined, measure, single_windows
from dmc_jax.inference.pages import empty_pages
from dmc_jax.model.causal_attention import over_int8
from dmc_jax.policies.dense import Dense
from pallas_kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention
from pallas_kernels.decode_attention.workloads import Workload, make_inputs, ragged_lengths
from pallas_kernels.quantisation import quantise

PARTS = ("attention", "quality", "serving")
WIDTHS, PAGE, QUERIES = (64, 128), 16, 4
RATIOS = (1, 4)  # served
SPLIT = "test"


def attention_errors() -> list[dict]:
    """Of every implementation that runs here, over pages of either width."""
    rows = []
    lengths = ragged_lengths(32, mean=512, longest=2048)
    for width in WIDTHS:
        inputs = make_inputs(Workload("normal", lengths, QUERIES, width, PAGE))
        how = {"scale": width**-0.5}
        exact = np.asarray(decode_attention(*inputs, **how, implementation="reference"))
        steps, scales = {}, {}
        for name in "kv":
            pages = getattr(inputs, f"{name}_pages")
            steps[f"{name}_pages"], scales[f"{name}_scale"] = quantise(pages, "float32")
        half = {name: getattr(inputs, name).astype(jnp.bfloat16) for name in steps}
        for implementation in IMPLEMENTATIONS.names:
            if IMPLEMENTATIONS.unavailable(implementation):
                continue
            for dtype, pages, more in (("int8", steps, scales), ("bfloat16", half, {})):
                out = decode_attention(
                    *inputs._replace(**pages), **how, implementation=implementation, **more
                )
                off = np.asarray(out) - exact
                relative = np.sqrt(np.mean(off**2) / np.mean(exact**2))
                about = {"width": width, "implementation": implementation, "pages": dtype}
                rows.append(about | {"error": float(f"{relative:.3g}")})
    return rows


def slot_bytes(width: int) -> dict[str, float]:
    """Of a key and a value, by the dtype of the pages: what `empty_pages` comes to."""
    return {
        dtype: jax.eval_shape(lambda dtype=dtype: empty_pages(1, PAGE, width, dtype)).page_bytes
        / PAGE
        for dtype in ("float32", "bfloat16", "int8")
    }


def quality(options: argparse.Namespace) -> list[dict]:
    """A model with pages of float32 and of int8, dense and with gates."""
    try:
        model = open_model(options.checkpoint)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    data = [open_data(path) for path in options.data.split(",")]
    share = options.windows // len(data)
    some = joined([single_windows(each, SPLIT, options.length, share) for each in data])
    run = {"params": model.params, "config": model.config, "some": some}
    policies = {"dense": Dense()}
    if options.gates:
        gates = gates_for(options.gates, model.config)
        check_base(gates, model.params, model.config)
        policies |= {f"gates, {ratio:g}x": gates.at(ratio) for ratio in options.ratios}
    dense, rows = measure(**run, policy=Dense()), []
    kinds = {"float32": causal_attention, "int8": over_int8(causal_attention)}
    of_slot = slot_bytes(model.config.head_dim)
    for (name, policy), (dtype, attention) in itertools.product(policies.items(), kinds.items()):
        measured = measure(**run, policy=policy, dense=dense, attention=attention)
        figures = measured.figures(dense)
        size = figures["end_slots"] * of_slot[dtype] * model.config.kv_rows
        row = {"policy": name, "pages": dtype, "cache_bytes": round(size)} | figures
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def serving(sequences: int, requests: int) -> dict:
    """Dense and compressed, with pages of either kind, in as many bytes as dense ones hold."""
    model = random_model.make(throughput.MODEL, RATIOS[1:])
    kv_bytes = sequences * throughput.SEQUENCE_BYTES
    return {
        "model": random_model.sizes(model.config),
        "prompt_tokens": throughput.PROMPT,
        "new_tokens": throughput.NEW,
        "page": throughput.PAGE,
        "kv_bytes": kv_bytes,
        "requests": requests,
        "served": [
            {"asked": ratio, "pages": dtype}
            | throughput.serve(model, ratio, kv_bytes, requests, dtype)
            for ratio in RATIOS
            for dtype in ("float32", "int8")
        ],
    }


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}; default: all that can be")
    parser.add_argument("--checkpoint", type=Path, help="a dense model, for quality")
    parser.add_argument("--data", help="prepared folders with its tokenizer, a comma between two")
    parser.add_argument("--gates", help="their file or name, for quality at ratios")
    parser.add_argument("--ratios", type=float, nargs="*", default=[2, 4])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--sequences", type=int, default=2, help="dense ones that the bytes hold")
    parser.add_argument("--requests", type=int, default=16, help="served")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("int8_pages_cpu.json")
    )
    options = parser.parse_args()
    has_model = options.checkpoint is not None and options.data is not None
    usual = [part for part in PARTS if part != "quality" or has_model]
    parts = options.parts.split(",") if options.parts else usual
    if not set(parts) <= set(PARTS) or ("quality" in parts and not has_model):
        parser.error(f"--parts: some of {','.join(PARTS)}; quality needs --checkpoint and --data")
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    command = " ".join(["python -m benchmarks.int8_pages", *sys.argv[1:]])
    record["measures"] = __doc__
    record["slot_bytes"] = {f"H {width}": slot_bytes(width) for width in WIDTHS}
    for part in parts:
        found = {"machine": machine(command)}
        if part == "attention":
            found["rows"] = attention_errors()
        elif part == "quality":
            about = {"model": str(options.checkpoint), "gates": options.gates, "split": SPLIT}
            about |= {"windows": options.windows, "length": options.length}
            found |= about | {"rows": quality(options)}
        else:
            found |= serving(options.sequences, options.requests)
        record[part] = found
        print(json.dumps(found, indent=1))
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
