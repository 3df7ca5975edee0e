"""How many sequences and tokens a second an engine has, from a queue that is longer than it."""

import time
from typing import NamedTuple

import numpy as np

from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams


class NoText:
    """A tokenizer for prompts that are ids; no token ends a sequence."""

    bos_id, eos_id, pad_id = 0, -1, 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Refuses: prompts are ids."""
        raise NotImplementedError("prompts are token ids here")

    def decode(self, ids) -> str:
        """Nothing."""
        return ""


class Served(NamedTuple):
    """What became of a queue."""

    ratio: float  # tokens per slot at the ends of sequences, on average
    sequences: float  # in the cache, on average over the steps
    most_sequences: int
    tokens_per_second: float  # new ones, prompts and waiting included
    seconds: float
    gave_pages_back: int  # times that a sequence had to, for others to go on


def serve(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Served:
    """Let an engine work off prompts that are all there from the start.

    Args:
        engine: idle, and all that it needs compiled, `warm_up`.
        prompts: of token ids.
        new_tokens: that follow each, greedily.
    """
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(new_tokens, temperature=0.0))
    running, ratios, given_back, written = [], [], 0, 0
    start = time.perf_counter()
    while engine.unfinished:
        before = set(engine.running)
        ended = {e.sequence: e.result for e in engine.step() if e.finish_reason}
        now = set(engine.running) | set(ended)
        given_back += len(before - now)
        running.append(len(now))
        ratios += [result.ratio for result in ended.values()]
        written += sum(result.new_tokens for result in ended.values())
    seconds = time.perf_counter() - start
    return Served(
        ratio=round(float(np.mean(ratios)), 3),
        sequences=round(float(np.mean(running)), 2),
        most_sequences=max(running),
        tokens_per_second=round(written / seconds, 1),
        seconds=round(seconds, 2),
        gave_pages_back=given_back,
    )


def warm_up(engine: Engine, prompt: list[int], new_tokens: int) -> None:
    """Compile what `serve` needs, also for a sequence that gave its pages back and is read again.

    Args:
        engine: idle.
        prompt: of the length to come, which is repeated in part.
        new_tokens: that follow each.
    """
    for extra in (0, 20, 120, new_tokens - 2):
        if extra < new_tokens:
            again = [*prompt, *prompt[:extra]]
            engine.generate([again], SamplingParams(2, temperature=0.0))
