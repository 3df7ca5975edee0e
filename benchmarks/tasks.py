"""What methods cost a model on tasks: a needle in essays, a pass key, functions to write.

    python -m benchmarks.tasks --checkpoint=MODEL --gates=FILE [FILE ...] [--run_code]

Answers are greedy, by the engine, whose cache is counted. Needles are compared in cells, a length
and a depth, that the dense model solves; beside what is said stands how likely the known answer is.
Of functions, how many tests they pass is known with `--run_code` alone, which runs what the model
wrote (`evaluation.judge` says how); beside it stand how much it writes, and how likely the known
solution is, which tells apart models too small for any. TOVA, H2O, StreamingLLM and a fixed stride
get the slots that the first file's gates come to, as in `benchmarks.gates`. A second run with the
same output goes on where the first was.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.gates import name_of
from dmc_jax.checkpoints.gates import check_base, gates_for
from dmc_jax.checkpoints.models import load_tokenizer_of, open_model
from dmc_jax.commands import in_a_line
from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.packages import package_files
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.evaluation.human_eval import (
    PROBLEMS,
    STOP,
    judged,
    load_problems,
    prompt_for,
    solution_of,
)
from dmc_jax.evaluation.judge import isolation
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.needle import ESSAYS, NEEDLES, NEW_TOKENS, SOLVED, by_depth, trials
from dmc_jax.evaluation.side_by_side import OTHERS, others_like
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.model.llama import unstack_layers
from dmc_jax.policies.dense import Dense

DTYPE = "float32"


class Model:
    """What all rows share."""

    def __init__(self, options):
        self.model = open_model(options.checkpoint)
        self.tokenizer = load_tokenizer_of(self.model)
        plain = options.plain or load_chat_template(Path(self.model.tokenizer)) is None
        self.chat = None if plain else Path(self.model.tokenizer)
        self.config = self.model.config
        self.unstacked = unstack_layers(self.model.params, self.config, DTYPE)
        self.options = options

    def answers(self, policy, prompts, new_tokens, stop=()):
        """Continue prompts; also says what that took."""
        engine = Engine(
            *(self.unstacked, self.config, self.tokenizer),
            policy=policy,
            max_sequences=self.options.sequences,
            kv_bytes=self.options.kv_bytes,
            dtype=DTYPE,
        )
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, stop=stop)
        results = engine.generate(prompts, params)
        tokens = np.array([result.prompt_tokens + result.new_tokens for result in results])
        slots = tokens / np.array([result.ratio for result in results])
        took = {
            "ratio_at_end": tokens.sum() / slots.sum(),
            "end_slots": slots.mean(),
            "cache_bytes": np.mean([result.live_cache_bytes for result in results]),
            "dense_bytes": np.mean([result.dense_cache_bytes for result in results]),
        }
        return results, {name: round(float(x), 4) for name, x in took.items()}

    def scores(self, policy, prompts, answers):
        """Say how likely known answers are."""
        run = self.model.params, self.config, prompts, answers, policy
        return score_answers(*run, batch=self.options.batch)


def needles(model: Model, made, policy) -> dict:
    """A row: what is found at each depth."""
    prompts = [trial.prompt for trial in made]
    results, took = model.answers(policy, prompts, NEW_TOKENS)
    scored = model.scores(policy, prompts, [trial.answer for trial in made])
    return took | by_depth(made, [result.text for result in results], scored)


def functions(model: Model, problems, policy) -> dict:
    """A row: of every problem whether it is solved, and how much was written."""
    prompts = [prompt_for(problem, model.tokenizer, model.chat) for problem in problems]
    results, row = model.answers(policy, prompts, model.options.new_tokens, STOP)
    written = [result.new_tokens for result in results]
    row["mean_new_tokens"] = float(np.mean(written))
    row["cut_short"] = sum(result.finish_reason == "length" for result in results)
    solutions = [solution_of(problem, model.tokenizer) for problem in problems]
    nats = [each.nats.mean() for each in model.scores(policy, prompts, solutions)]
    row["solution_nats"] = round(float(np.mean(nats)), 4)
    if model.options.run_code:
        said = [judged(*pair) for pair in zip(problems, (r.text for r in results), strict=True)]
        row["pass_at_1"] = round(said.count("passed") / len(said), 4)
        row["passed"] = [int(each == "passed") for each in said]
        row["timed_out"] = said.count("timed out")
    return row | {"new_tokens": written}


def compare(about: dict, files, options, record, measure, solves=lambda row: True) -> None:
    """Adds what the record lacks of one task, and writes it row by row.

    Args:
        about: the task and its size.
        files: of gates.
        options: which methods.
        record: is added to.
        measure: a policy, and the row of the dense model if there is one -> a row.
        solves: whether the dense model's row is worth comparing with.
    """

    def row_of(more: dict, policy, dense=None) -> dict:
        keys = about | more
        there = next((row for row in record["rows"] if row.items() >= keys.items()), None)
        if there is not None:
            return there
        row = keys | measure(policy, dense)
        print(json.dumps(row), flush=True)
        record["rows"].append(row)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        return row

    dense = row_of({"method": "dense"}, Dense())
    if not solves(dense):
        print(f"{about}: the dense model solves nothing to compare with", flush=True)
        return
    for ratio in options.ratios:
        rows = [
            row_of({"method": name_of(gates), "asked": ratio}, gates.at(ratio), dense)
            for gates in files
            if gates.table[0].ratio <= ratio <= gates.table[-1].ratio
        ]
        for name in options.others if rows else ():
            for kind, policy in others_like(name, rows[0]).items():
                if kind in options.budgets:
                    more = {"method": name, "budget": kind, "like": ratio}
                    more["slots_of"] = rows[0]["method"]
                    row_of(more, policy, dense)


def solved_depths(row: dict) -> list[str]:
    """The depths at which a needle was found, of a dense model's row."""
    return [depth for depth, share in row["found"].items() if share >= SOLVED]


def compare_needles(task, model, files, options, record) -> None:
    """Rows of one task at every length."""
    essays = [each.decode() for each in package_files(*ESSAYS).values()]
    for length in options.lengths:
        made = trials(
            *(task, essays, model.tokenizer),
            length=length,
            depths=options.depths,
            count=options.trials,
            chat=model.chat,
        )

        def measure(policy, dense, made=made):
            if dense is not None:
                made = [trial for trial in made if f"{trial.depth:g}" in solved_depths(dense)]
            return needles(model, made, policy)

        about = {"task": task, "length": length, "depths": options.depths, "trials": options.trials}
        compare(about, files, options, record, measure, solved_depths)


def compare_functions(model, files, options, record) -> None:
    """Rows of HumanEval."""
    [content] = package_files(*PROBLEMS).values()
    problems = load_problems(content)[: options.problems]
    about = {"task": "humaneval", "problems": len(problems), "run_code": options.run_code}
    about["most_new_tokens"] = options.new_tokens
    if options.run_code:
        about["network"] = "cut" if isolation() else "open"

    def measure(policy, dense):  # all problems, whichever the dense model solves
        return functions(model, problems, policy)

    compare(about, files, options, record, measure)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes the JSON file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--gates", nargs="*", default=[])
    known = [*NEEDLES, "humaneval"]
    parser.add_argument("--tasks", nargs="+", default=known, choices=known)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--others", nargs="*", default=list(OTHERS), choices=list(OTHERS))
    parser.add_argument("--budgets", nargs="*", default=["grows"], choices=["grows", "end"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 25, 50, 75, 100])
    parser.add_argument("--trials", type=int, default=2, help="of each depth")
    parser.add_argument("--problems", type=int, default=164, help="of HumanEval")
    parser.add_argument("--new_tokens", type=int, default=512, help="of a function, at most")
    parser.add_argument("--run_code", action="store_true", help="run what the model wrote")
    parser.add_argument("--plain", action="store_true", help="no chat template")
    parser.add_argument("--sequences", type=int, default=8, help="at a time, in the engine")
    parser.add_argument("--kv_bytes", type=int, default=2**30, help="of its cache")
    parser.add_argument("--batch", type=int, default=1, help="known answers at a time")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tasks_cpu.json"))
    options = parser.parse_args(arguments)
    model = Model(options)
    files = [gates_for(file, model.config) for file in options.gates]
    for gates in files:
        check_base(gates, model.model.params, model.config)
    record = {
        "measures": "needles found, functions that pass their tests, and slots a row",
        "machine": machine(" ".join(["python -m benchmarks.tasks", *arguments])),
        "chat": model.chat is not None,
        "gates": {name_of(gates): gates.about for gates in files},
        "rows": [],
    }
    if options.output.exists():
        there = json.loads(options.output.read_text())
        if there["chat"] != record["chat"] or not record["gates"].items() >= there["gates"].items():
            parser.error(f"{options.output} is of other prompts or gates: name another --output")
        record["rows"] = there["rows"]
    for task in options.tasks:
        if task == "humaneval":
            compare_functions(model, files, options, record)
        else:
            compare_needles(task, model, files, options, record)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    in_a_line(main)
