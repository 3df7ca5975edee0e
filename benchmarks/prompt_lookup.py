"""What drafts from the prompt save: new tokens a second with and without them, and how many count.

    python -m benchmarks.prompt_lookup --checkpoint=MODEL --gates=smollm2_135m_dms

Greedy text after pieces of two kinds: functions that are asked for once more with a name changed,
most of which is a quotation, and beginnings of files of Python's library, which go on freely. One
sequence at a time and some together, the dense model and its gates at 4x. Engines with and without
drafts take turns; both have said everything once before, so that nothing is left to compile. Texts
that differ are counted: sums of another order may decide between two tokens that nearly tie.
"""

import argparse
import inspect
import json
import pathlib
import statistics
import sysconfig
import textwrap
import time

import jax

from dmc_jax.checkpoints.models import find_model
from dmc_jax.errors import UserError
from dmc_jax.evaluation.machine import machine
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams

RATIO, NEW, SEATS = 4, 128, 4
PIECES = 8  # of each kind
BEGINNING = 2000  # characters


def quoting() -> list[str]:
    """Functions, each with a request to write it again in another way."""
    functions = (
        *(textwrap.dedent, textwrap.indent, statistics.median, statistics.quantiles),
        *(inspect.cleandoc, inspect.getmodulename, pathlib.Path.exists, pathlib.Path.mkdir),
    )
    prompts = []
    for function in functions[:PIECES]:
        source = textwrap.dedent(inspect.getsource(function))
        name = function.__name__
        prompts.append(
            f"# The function {name}:\n\n{source}\n"
            f"# The same function, whose name is my_{name} now:\n\ndef my_{name}("
        )
    return prompts


def free() -> list[str]:
    """Beginnings of files."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "datetime", "heapq", "pathlib", "typing", "subprocess", "random")
    files = [(library / f"{name}.py").read_text(encoding="utf-8") for name in names[:PIECES]]
    return [text[:BEGINNING] for text in files]


def run(engine: Engine, prompts: list[str], together: int) -> tuple[list, float]:
    """The results, and the seconds that took."""
    params = SamplingParams(NEW, temperature=0.0, ignore_eos=True)
    results, start = [], time.perf_counter()
    for begin in range(0, len(prompts), together):
        results += engine.generate(prompts[begin : begin + together], params)
    return results, time.perf_counter() - start


def main() -> None:
    """Measures, prints and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--gates", help="of the checkpoint")
    parser.add_argument("--draft", type=int, default=7, help="tokens at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("prompt_lookup_cpu.json"),
    )
    options = parser.parse_args()
    try:
        model = find_model(options.checkpoint).load()
    except UserError as error:
        parser.error(str(error))
    kinds = {"quoting": quoting(), "free": free()}
    models = {"dense": {"policy": "dense"}}
    if options.gates:
        models[f"{RATIO}x"] = {"gates": options.gates, "ratio": RATIO}
    rows = []
    for name, how in models.items():
        engines = {
            draft: Engine.from_checkpoint(model, max_sequences=SEATS, prompt_lookup=draft, **how)
            for draft in (0, options.draft)
        }
        for kind, prompts in kinds.items():
            for together in (1, SEATS):
                seconds, said = {draft: [] for draft in engines}, {}
                for turn in range(options.rounds + 1):
                    for draft, engine in engines.items():
                        said[draft], took = run(engine, prompts, together)
                        seconds[draft] += [took] if turn else []
                rows.append(_row(name, kind, together, said, seconds))
                print(json.dumps(rows[-1]), flush=True)
    about = {
        "measures": "new tokens a second, reading the prompts counted, with and without drafts",
        "machine": machine(f"python -m benchmarks.prompt_lookup --draft={options.draft}"),
        "model": pathlib.Path(options.checkpoint).name,
        "draft_tokens": options.draft,
        "new_tokens": NEW,
        "device": jax.default_backend(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(about, indent=2) + "\n")
    print(f"wrote {options.output}")


def _row(name, kind, together, said, seconds):
    (plain, took), (drafted, took_with) = (
        (said[draft], statistics.median(seconds[draft])) for draft in sorted(said)
    )
    new = sum(result.new_tokens for result in plain)
    accepted = sum(result.accepted_tokens for result in drafted)
    tried = sum(result.drafted_tokens for result in drafted)
    return {
        "cache": name,
        "text": kind,
        "sequences_at_a_time": together,
        "prompt_tokens": sum(result.prompt_tokens for result in plain),
        "new_tokens": new,
        "new_tokens_per_second": round(new / took, 1),
        "with_drafts": round(new / took_with, 1),
        "times_as_fast": round(took / took_with, 2),
        "drafted_tokens": tried,
        "accepted_tokens": accepted,
        "accepted_share": round(accepted / max(tried, 1), 3),
        "texts_that_differ": sum(a.tokens != b.tokens for a, b in zip(plain, drafted, strict=True)),
        "seconds": {str(draft): [round(x, 2) for x in each] for draft, each in seconds.items()},
    }


if __name__ == "__main__":
    main()
