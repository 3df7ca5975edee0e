"""Tasks that need memory, for models small enough to be trained on them in minutes.

Every document is a line of words of one length, most of it filler that carries nothing (the
sentences of RULER's haystacks, Hsieh et al. 2024, arXiv 2404.06654), and ends with questions whose
answers were said somewhere before:

    recall    many keys, each with a value, asked for in another order: multi-query associative
              recall (Arora et al. 2023, arXiv 2312.04927) among filler
    passkey   one key with its value (Mohtashami & Jaggi 2023, arXiv 2305.16300)
    tracking  chains of assignments, of which the first names a value: variable tracking (RULER)

A fact is a name and what it stands for: a value, or another name of its chain. What is asked for
stands one word after its name, there as here, or small models would not learn it in minutes. A word
is a token. What stands in a document is drawn from its seed alone.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers

from dmc_jax.config import ModelConfig
from dmc_jax.data.tokenizer import Tokenizer, encode_prompt
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.policies.policy import Policy

FILLER = (
    "the grass is green .",
    "the sky is blue .",
    "the sun is yellow .",
    "here we go .",
    "there and back again .",
)
NAMES = tuple(f"n{i:02}" for i in range(32))
VALUES = tuple(f"v{i:02}" for i in range(32))
_BOS, _EOS, _UNKNOWN = "<s>", "</s>", "<unk>"
_SENTENCE = 6  # words at most of a sentence of filler, and more than of any other


class Question(NamedTuple):
    """The end of a document: words, and which of them are answers."""

    words: list[str]
    answers: list[int]  # places in `words`


def recall(rng: random.Random, pairs: int = 12) -> tuple[list[str], Question]:
    """Say values of names, and ask for each in another order."""
    names, values = rng.sample(NAMES, pairs), rng.choices(VALUES, k=pairs)
    facts = [f"{name} {value} ." for name, value in zip(names, values, strict=True)]
    asked = rng.sample(list(zip(names, values, strict=True)), pairs)
    return facts, _ask(asked)


def passkey(rng: random.Random) -> tuple[list[str], Question]:
    """Say one value of one name, and ask for it."""
    return recall(rng, pairs=1)


def tracking(rng: random.Random, chains: int = 3, links: int = 3) -> tuple[list[str], Question]:
    """Give values along chains of names, and ask for the value of every name."""
    names = rng.sample(NAMES, chains * links)
    values = rng.sample(VALUES, chains)
    facts, known = [], []
    for step in range(links):
        for chain in range(chains):
            name = names[chain * links + step]
            source = values[chain] if step == 0 else names[chain * links + step - 1]
            facts.append(f"{name} {source} .")
            known.append((name, values[chain]))
    return facts, _ask(rng.sample(known, len(known)))


def _ask(pairs: Sequence[tuple[str, str]]) -> Question:
    words, answers = ["?"], []
    for name, value in pairs:
        words += [name, value]
        answers.append(len(words) - 1)
    return Question(words, answers)


TASKS: dict[str, Callable[[random.Random], tuple[list[str], Question]]] = {
    "recall": recall,
    "passkey": passkey,
    "tracking": tracking,
}


def document(task: str, seed: int, length: int) -> tuple[list[str], list[int]]:
    """Write a document.

    Args:
        task: of `TASKS`.
        seed: of all that is drawn.
        length: words, which with the mark before them are as many tokens and one.

    Returns:
        Its words, and where answers stand among them.

    Raises:
        ValueError: the facts and questions are longer.
    """
    rng = random.Random(f"{task} {seed}")
    facts, question = TASKS[task](rng)
    room = length - len(question.words) - sum(len(fact.split()) for fact in facts)
    if room < _SENTENCE:
        raise ValueError(f"length: {length} words are too few for {task}")
    sentences, filled = [], 0
    while filled <= room - _SENTENCE:
        sentences.append(rng.choice(FILLER))
        filled += len(sentences[-1].split())
    sentences += ["."] * (room - filled)
    # Facts stay in their order: a chain's links are said one after another.
    places = sorted(rng.sample(range(len(sentences) + len(facts)), len(facts)))
    for place, fact in zip(places, facts, strict=True):
        sentences.insert(place, fact)
    before = " ".join(sentences).split()
    return before + question.words, [len(before) + answer for answer in question.answers]


def word_tokenizer() -> WordTokenizer:
    """Make the tokenizer of these documents, a word an id."""
    words = sorted({word for sentence in FILLER for word in sentence.split()})
    vocabulary = [_UNKNOWN, _BOS, _EOS, *words, "?", *NAMES, *VALUES]
    ids = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = WordTokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([_UNKNOWN, _BOS, _EOS])
    return tokenizer


def accuracy(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    task: str,
    policy: Policy,
    *,
    seeds: Sequence[int],
    length: int,
) -> tuple[float, float]:
    """Say which share of answers a model has right, each after the right ones before it.

    Args:
        params: of the model, as `init_params` gives them.
        config: its sizes.
        tokenizer: `word_tokenizer`, as it was loaded.
        task: of `TASKS`.
        policy: what its rows keep.
        seeds: of the documents.
        length: their words.

    Returns:
        The share, and tokens per slot when the last answer is asked for.
    """
    prompts, answers, asked = [], [], []
    for seed in seeds:
        words, places = document(task, seed, length)
        ids, begin = encode_prompt(tokenizer, " ".join(words)), 1 + places[0]  # after BOS
        prompts.append(ids[:begin])
        answers.append(ids[begin:])
        asked.append(np.array(places) + 1 - begin)
    scored = score_answers(params, config, prompts, answers, policy, batch=len(prompts))
    right = [one.first[at] for one, at in zip(scored, asked, strict=True)]
    slots = sum(one.slots for one in scored)
    return float(np.mean(right)), len(prompts) * length / slots
