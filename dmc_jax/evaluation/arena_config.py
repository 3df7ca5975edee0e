"""What an arena is to measure: the fields of its config and their flags."""

import dataclasses

from dmc_jax.errors import UserError
from dmc_jax.evaluation.needle import NEEDLES
from dmc_jax.evaluation.side_by_side import OF_PROMPTS, OTHERS, PAGES

BUDGETS = ("grows", "end", "mean")
CONTESTS = ("text", *NEEDLES, "humaneval", "serving")


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
    kv_dtypes: tuple[str, ...] = ("float32",)  # of pages; with int8, dense and gates come twice
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
            ("kv_dtypes", PAGES),
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
