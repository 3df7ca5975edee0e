"""Methods beside the dense model at equal slots of cache: on text, on needles, on functions.

Every contest runs the dense model first and then, for each ratio, the gates; methods that need no
gates get the slots that the first gates of a kind came to, in budgets of these kinds:

    grows   t / ratio slots after t tokens, whose mean and end are those of the gates; a stride
            knows no other
    end     a fixed number, as many as the gates hold at the end: the same peak
    mean    a fixed number with which a row holds as many on average over a window

The dense model and gates also stand there with pages of int8. Rows are recorded one by one.
Differences from the dense model are paired: by window of text, or in those cells of needles that
the dense model solves.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dmc_jax.checkpoints.gates import FILE, StoredGates
from dmc_jax.checkpoints.models import LoadedModel
from dmc_jax.core.attention import causal_attention
from dmc_jax.data.packages import package_files
from dmc_jax.data.prepared import PreparedData
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.evaluation.arena_config import ArenaConfig, ServingConfig
from dmc_jax.evaluation.human_eval import (
    PROBLEMS,
    STOP,
    judged,
    load_problems,
    prompt_for,
    solution_of,
)
from dmc_jax.evaluation.judge import isolation
from dmc_jax.evaluation.needle import ESSAYS, NEEDLES, NEW_TOKENS, SOLVED, by_depth, trials
from dmc_jax.evaluation.record import Record, Row
from dmc_jax.evaluation.side_by_side import (
    OTHERS,
    PAGES,
    Measured,
    attention_over,
    joined,
    measure,
    others_like,
    single_windows,
    slot_bytes,
)
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import Policy

_FIRST_BUCKET = 128  # tokens; each later one ends where twice as many came


@runtime_checkable
class Written(Protocol):
    """What became of a prompt: the fields of `inference.requests.Result` that are read here."""

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    ratio: float
    live_cache_bytes: int
    peak_cache_bytes: int
    dense_cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Arena:
    """What all contests share."""

    config: ArenaConfig
    model: LoadedModel
    tokenizer: Tokenizer
    chat: Path | None  # the tokenizer's file, where a chat template lies beside it and is wanted
    gates: tuple[StoredGates, ...]
    texts: tuple[PreparedData, ...]
    record: Record
    # (policy, of pages, prompts, most new tokens, stop strings) -> what followed each, greedily
    write: Callable[[Policy, str, list, int, Sequence[str]], list[Written]]
    # (policy, of pages, prompts, sizes, tokens per slot to expect) -> figures
    serve: Callable[[Policy, str, list, ServingConfig, float], Row]


def with_margins(files: Sequence[StoredGates], margins: Sequence[float]) -> tuple[StoredGates, ...]:
    """Add to gates that merge the same that drop what is far enough above the threshold.

    What is dropped takes no slot of its own either, so that their tables hold.

    Args:
        files: of gates.
        margins: logits above the threshold, `DelayedDMC.margin`.
    """
    more = [
        dataclasses.replace(gates, policy=dataclasses.replace(gates.policy, margin=margin))
        for gates in files
        if isinstance(gates.policy, DelayedDMC) and gates.policy.margin is None
        for margin in margins
    ]
    return (*files, *more)


def name_of(gates: StoredGates) -> str:
    """Name a file of gates: a run's, which all have one name, by the run."""
    file = Path(gates.path).absolute()
    return (file.parent.name if file.name == FILE else file.stem) + _margin(gates)


def kind_of(gates: StoredGates) -> str:
    """Say what files have in common that differ by their seeds."""
    policy, tokens = gates.policy, gates.about.get("distilled_tokens", 0)
    return f"{policy.name}, delay {policy.delay}{_margin(gates)}, {tokens:,} tokens"


def _margin(gates: StoredGates) -> str:
    margin = getattr(gates.policy, "margin", None)
    return "" if margin is None else f", margin {margin:g}"


def about_gates(files: Sequence[StoredGates]) -> dict[str, Row]:
    """Say of gates, by their names, how they were made.

    Raises:
        UserError: two of one name.
    """
    names = [name_of(gates) for gates in files]
    if len(set(names)) < len(names):
        raise UserError(f"gates: files of one name cannot be told apart, got {', '.join(names)}")
    kinds = ({"kind": kind_of(gates)} | gates.about for gates in files)
    return dict(zip(names, kinds, strict=True))


def compare(
    arena: Arena,
    about: Row,
    measured: Callable[[Policy, str, Row | None, float], Row],
    solves: Callable[[Row], Any] = bool,
    prompted: bool = True,
) -> None:
    """Add what the record lacks of one contest.

    Args:
        arena: who takes part.
        about: the contest and its size.
        measured: a policy, the dtype of the pages, the row of the dense model if there is one, and
            tokens per slot to expect -> a row.
        solves: whether the dense model's row is worth comparing with.
        prompted: whether sequences begin with a prompt, which some methods cut.
    """
    others = [name for name in arena.config.others if prompted or name in OTHERS]
    plain, *rounded = PAGES

    def row_of(more: Row, policy: Policy, kv_dtype: str = plain) -> Row:
        ratio = more.get("asked", more.get("like", 1.0))
        keys = about | more | {"kv_dtype": kv_dtype}
        return arena.record.row(keys, lambda: measured(policy, kv_dtype, dense, ratio))

    def add_rounded(more: Row, policy: Policy) -> None:
        for kv_dtype in rounded:
            if kv_dtype in arena.config.kv_dtypes:
                row_of(more, policy, kv_dtype)

    dense, named = None, {"method": "dense"}
    dense = row_of(named, Dense())
    if not solves(dense):
        arena.record.report(f"{about}: the dense model solves nothing to compare with")
        return
    add_rounded(named, Dense())
    for ratio in arena.config.ratios:
        models = {}  # kind of gates -> what the others are to be like
        for gates in arena.gates:
            if gates.table[0].ratio <= ratio <= gates.table[-1].ratio:
                name = name_of(gates)
                named = {"method": name, "asked": ratio}
                row = row_of(named, gates.at(ratio))
                add_rounded(named, gates.at(ratio))
                models.setdefault(kind_of(gates), (name, row))
        if not arena.gates:
            models = {"": ("ratio", {"ratio_at_end": ratio})}
        for other, (name, row) in itertools.product(others, models.values()):
            for budget, policy in others_like(other, row).items():
                if budget in arena.config.budgets:
                    more = {"method": other, "budget": budget, "like": ratio, "slots_of": name}
                    row_of(more, policy)


def text(arena: Arena) -> None:
    """Compare on held-out windows: nats a token, by where a token stands, and divergence."""
    config = arena.config.text
    if not arena.texts:
        raise UserError("text.data: give prepared text, --config.text.data=DIR[,DIR]")
    for length in config.lengths:
        share = -(-config.windows // len(arena.texts))
        parts = [single_windows(data, config.split, length, share) for data in arena.texts]
        some = joined(parts)
        run = functools.partial(
            measure, arena.model.params, arena.model.config, some, batch=config.batch
        )
        dense = functools.cache(functools.partial(run, Dense()))

        def row(policy, kv_dtype, _row, _ratio, run=run, dense=dense):
            attention = attention_over(kv_dtype)
            same = attention is causal_attention and isinstance(policy, Dense)
            one = dense() if same else run(policy, dense=dense(), attention=attention)
            return text_row(one, dense(), slot_bytes(arena.model.config, kv_dtype))

        about = {"contest": "text", "length": length, "windows": len(some["tokens"])}
        compare(arena, about, row, prompted=False)


def text_row(one: Measured, dense: Measured, bytes_a_slot: int) -> Row:
    """Sum a policy up against the dense model on the same windows.

    Args:
        one: of the policy.
        dense: of the dense model.
        bytes_a_slot: in every row of the model.
    """
    T = one.nats.shape[1]
    rises = one.nats - dense.nats
    ends = [*itertools.takewhile(lambda end: end < T, (_FIRST_BUCKET << n for n in range(64))), T]
    buckets = {f"{a}-{b}": rises[:, a:b].mean() for a, b in itertools.pairwise([0, *ends])}
    return one.figures(dense) | {
        "nats": round(float(one.nats.mean()), 4),
        "mean_bytes": round(float(one.slots.mean()) * bytes_a_slot),
        "peak_bytes": round(float(one.slots.max(axis=1).mean()) * bytes_a_slot),
        "percent_by_position": {
            where: round(100 * math.expm1(float(rise)), 3) for where, rise in buckets.items()
        },
        "rises": [round(float(x), 5) for x in one.rises(dense)],
    }


def _written(arena: Arena, policy, kv_dtype, prompts, new_tokens, stop=()):
    results = arena.write(policy, kv_dtype, prompts, new_tokens, stop)
    tokens = np.array([result.prompt_tokens + result.new_tokens for result in results])
    slots = tokens / np.array([result.ratio for result in results])
    took = {
        "ratio_at_end": tokens.sum() / slots.sum(),
        "end_slots": slots.mean(),
        "cache_bytes": np.mean([result.live_cache_bytes for result in results]),
        "peak_bytes": np.mean([result.peak_cache_bytes for result in results]),
        "dense_bytes": np.mean([result.dense_cache_bytes for result in results]),
    }
    return results, {name: round(float(x), 4) for name, x in took.items()}


def _scored(arena: Arena, policy, kv_dtype, prompts, answers):
    of_model = arena.model.params, arena.model.config
    attention = attention_over(kv_dtype)
    return score_answers(*of_model, prompts, answers, policy, attention=attention)


def needles(arena: Arena, task: str) -> None:
    """Compare on needles of one kind: what is found at each depth that the dense model finds."""
    config = arena.config.needles
    essays = [each.decode() for each in package_files(*ESSAYS).values()]
    for length in config.lengths:
        made = trials(
            *(task, essays, arena.tokenizer),
            length=length,
            depths=config.depths,
            count=config.trials,
            chat=arena.chat,
        )

        def row(policy, kv_dtype, dense, _ratio, made=made):
            if dense is not None:
                made = [each for each in made if f"{each.depth:g}" in solved_depths(dense)]
            prompts = [each.prompt for each in made]
            results, took = _written(arena, policy, kv_dtype, prompts, NEW_TOKENS)
            scored = _scored(arena, policy, kv_dtype, prompts, [each.answer for each in made])
            return took | by_depth(made, [result.text for result in results], scored)

        about = {"contest": task, "length": length, "depths": list(config.depths)}
        compare(arena, about | {"trials": config.trials}, row, solved_depths)


def solved_depths(row: Row) -> list[str]:
    """The depths at which a needle was found, of a dense model's row."""
    return [depth for depth, share in row["found"].items() if share >= SOLVED]


def functions(arena: Arena) -> None:
    """Compare on HumanEval: what passes its tests, if it may run, and how much is written."""
    config = arena.config.functions
    [content] = package_files(*PROBLEMS).values()
    problems = load_problems(content)[: config.problems]
    prompts = [prompt_for(problem, arena.tokenizer, arena.chat) for problem in problems]
    solutions = [solution_of(problem, arena.tokenizer) for problem in problems]
    about = {"contest": "humaneval", "problems": len(problems), "run_code": config.run_code}
    about["most_new_tokens"] = config.new_tokens
    if config.run_code:
        about["network"] = "cut" if isolation() else "open"

    def row(policy, kv_dtype, _row, _ratio):  # all problems, whichever the dense model solves
        results, took = _written(arena, policy, kv_dtype, prompts, config.new_tokens, STOP)
        written = [result.new_tokens for result in results]
        nats = [each.nats.mean() for each in _scored(arena, policy, kv_dtype, prompts, solutions)]
        took |= {
            "mean_new_tokens": float(np.mean(written)),
            "cut_short": sum(result.finish_reason == "length" for result in results),
            "solution_nats": round(float(np.mean(nats)), 4),
        }
        if config.run_code:
            texts = (result.text for result in results)
            said = [judged(*pair) for pair in zip(problems, texts, strict=True)]
            took["pass_at_1"] = round(said.count("passed") / len(said), 4)
            took["timed_out"] = said.count("timed out")
            took["passed"] = [int(each == "passed") for each in said]
        return took | {"new_tokens": written}

    compare(arena, about, row)


def serving(arena: Arena) -> None:
    """Compare tokens a second and sequences held, with one number of bytes for the cache."""
    config = arena.config.serving
    if not arena.texts:
        raise UserError("text.data: serving takes its prompts from it, --config.text.data=DIR")
    share = -(-config.requests // len(arena.texts))
    split, length = arena.config.text.split, config.prompt
    some = joined([single_windows(data, split, length, share) for data in arena.texts])
    prompts = some["tokens"][: config.requests].tolist()
    about = {"contest": "serving", **dataclasses.asdict(config)} | {"requests": len(prompts)}

    def row(policy, kv_dtype, _row, ratio):
        return arena.serve(policy, kv_dtype, prompts, config, ratio)

    compare(arena, about, row)


def run(arena: Arena) -> None:
    """Add what the record lacks, contest by contest."""
    for contest in arena.config.contests:
        if contest in NEEDLES:
            needles(arena, contest)
        else:
            {"text": text, "humaneval": functions, "serving": serving}[contest](arena)
