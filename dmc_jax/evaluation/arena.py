"""Methods beside the dense model at equal slots of cache: on text, on needles, on functions.

Every contest runs the dense model first and then, for each ratio, the gates; methods that need no
gates get the slots that the first gates of a kind came to, in budgets of these kinds:

    grows   t / ratio slots after t tokens, whose mean and end are those of the gates; a stride
            knows no other
    end     a fixed number, as many as the gates hold at the end: the same peak
    mean    a fixed number with which a row holds as many on average over a window

Rows are recorded one by one. Differences from the dense model are paired: by window of text, or in
those cells of needles that the dense model solves.
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
from dmc_jax.data.packages import package_files
from dmc_jax.data.prepared import PreparedData
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
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
from dmc_jax.evaluation.needle import ESSAYS, NEEDLES, NEW_TOKENS, SOLVED, by_depth, trials
from dmc_jax.evaluation.record import Record, Row
from dmc_jax.evaluation.side_by_side import (
    OF_PROMPTS,
    OTHERS,
    Measured,
    joined,
    measure,
    others_like,
    single_windows,
    slot_bytes,
)
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import Policy

BUDGETS = ("grows", "end", "mean")
CONTESTS = ("text", *NEEDLES, "humaneval", "serving")
_FIRST_BUCKET = 128  # tokens; each later one ends where twice as many came


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Held-out windows, each alone in a cache."""

    data: str = ""  # prepared text, DIR[,DIR]; of each an equal share of the windows
    split: str = "validation"
    lengths: tuple[int, ...] = (512, 1024, 2048)
    windows: int = 32
    batch: int = 4  # windows at a time


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """A sentence to be found in essays."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    trials: int = 2  # of each depth


@dataclasses.dataclass(frozen=True)
class FunctionConfig:
    """HumanEval."""

    problems: int = 164
    new_tokens: int = 512  # of a function, at most
    run_code: bool = False  # run what the model wrote, in a process with limits


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """Requests in a queue, which one pool of pages serves."""

    kv_bytes: int = 2**27  # of keys and values, for every method
    requests: int = 32
    prompt: int = 512  # tokens of a prompt, from the text
    new_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class ArenaConfig:
    """A model, who is measured on it, and by what."""

    name: str = "arena"  # of the folder of the record and its tables
    output: str = "results"  # where that folder lies
    checkpoint: str = ""  # of any format
    gates: tuple[str, ...] = ()  # files, or names of those that come along
    margins: tuple[float, ...] = ()  # with which gates that merge take part again, and drop too
    others: tuple[str, ...] = (*OTHERS, *OF_PROMPTS)  # what needs no gates
    ratios: tuple[float, ...] = (2.0, 4.0, 8.0)  # tokens per slot
    budgets: tuple[str, ...] = ("grows",)  # grows | end | mean
    contests: tuple[str, ...] = CONTESTS  # text | needle | passkey | humaneval | serving
    chat: bool = True  # needles and functions by the model's chat template, if it has one
    sequences: int = 8  # at a time, where a model writes
    kv_bytes: int = 2**30  # of the cache, where it writes
    text: TextConfig = TextConfig()
    needles: NeedleConfig = NeedleConfig()
    functions: FunctionConfig = FunctionConfig()
    serving: ServingConfig = ServingConfig()

    def __post_init__(self):
        for name, known in (
            ("others", OTHERS | OF_PROMPTS),
            ("budgets", BUDGETS),
            ("contests", CONTESTS),
        ):
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise UserError(f"{name}: expected {', '.join(known)}, got {unknown[0]!r}")
        if not self.ratios or min(self.ratios) <= 1:
            raise UserError(f"ratios: expected tokens per slot above 1, got {self.ratios}")
        if min(self.margins, default=0) < 0:
            raise UserError(f"margins: expected logits, 0 or more, got {self.margins}")
        for part in (self, self.text, self.needles, self.functions, self.serving):
            for name, value in vars(part).items():
                for number in value if isinstance(value, tuple) else (value,):
                    if type(number) is int and number < 1:
                        raise UserError(f"{name}: expected 1 or more, got {value}")


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
    # (policy, prompts, most new tokens, stop strings) -> what followed each prompt, greedily
    write: Callable[[Policy, list, int, Sequence[str]], list[Written]]
    # (policy, prompts, sizes, tokens per slot to expect) -> figures
    serve: Callable[[Policy, list, ServingConfig, float], Row]


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
    measured: Callable[[Policy, Row | None, float], Row],
    solves: Callable[[Row], Any] = bool,
    prompted: bool = True,
) -> None:
    """Add what the record lacks of one contest.

    Args:
        arena: who takes part.
        about: the contest and its size.
        measured: a policy, the row of the dense model if there is one, and tokens per slot to
            expect -> a row.
        solves: whether the dense model's row is worth comparing with.
        prompted: whether sequences begin with a prompt, which some methods cut.
    """
    others = [name for name in arena.config.others if prompted or name in OTHERS]

    def row_of(more: Row, policy: Policy) -> Row:
        ratio = more.get("asked", more.get("like", 1.0))
        return arena.record.row(about | more, lambda: measured(policy, dense, ratio))

    dense = None
    dense = row_of({"method": "dense"}, Dense())
    if not solves(dense):
        arena.record.report(f"{about}: the dense model solves nothing to compare with")
        return
    for ratio in arena.config.ratios:
        models = {}  # kind of gates -> what the others are to be like
        for gates in arena.gates:
            if gates.table[0].ratio <= ratio <= gates.table[-1].ratio:
                name = name_of(gates)
                row = row_of({"method": name, "asked": ratio}, gates.at(ratio))
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

        def row(policy, _row, _ratio, run=run, dense=dense):
            one = dense() if isinstance(policy, Dense) else run(policy, dense=dense())
            return text_row(one, dense(), slot_bytes(arena.model.config))

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


def _written(arena: Arena, policy, prompts, new_tokens, stop=()) -> tuple[list[Written], Row]:
    results = arena.write(policy, prompts, new_tokens, stop)
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


def _scored(arena: Arena, policy, prompts, answers):
    return score_answers(arena.model.params, arena.model.config, prompts, answers, policy)


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

        def row(policy, dense, _ratio, made=made):
            if dense is not None:
                made = [each for each in made if f"{each.depth:g}" in solved_depths(dense)]
            prompts = [each.prompt for each in made]
            results, took = _written(arena, policy, prompts, NEW_TOKENS)
            scored = _scored(arena, policy, prompts, [each.answer for each in made])
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

    def row(policy, _row, _ratio):  # all problems, whichever the dense model solves
        results, took = _written(arena, policy, prompts, config.new_tokens, STOP)
        written = [result.new_tokens for result in results]
        nats = [each.nats.mean() for each in _scored(arena, policy, prompts, solutions)]
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
    compare(arena, about, lambda policy, _, ratio: arena.serve(policy, prompts, config, ratio))


def run(arena: Arena) -> None:
    """Add what the record lacks, contest by contest."""
    for contest in arena.config.contests:
        if contest in NEEDLES:
            needles(arena, contest)
        else:
            {"text": text, "humaneval": functions, "serving": serving}[contest](arena)
