"""Tasks that need memory: what is asked was said, and a model that knows is right."""

import numpy as np
import pytest

from dmc_jax.data.tokenizer import load_tokenizer
from dmc_jax.evaluation import recall
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.evaluation.recall import TASKS, accuracy, document, word_tokenizer
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.window import Window
from tests.tiny_llama import build

LENGTH = 160


@pytest.mark.parametrize("task", TASKS)
def every_answer_was_said_and_none_can_be_guessed_test(task):
    values = set()
    for seed in range(20):
        words, places = document(task, seed, LENGTH)
        assert len(words) == LENGTH and document(task, seed, LENGTH) == (words, places)
        at = words.index("?")
        said = {
            words[i]: words[i + 1]
            for i in range(at)
            if words[i] in recall.NAMES and words[i + 1] != "."
        }
        for place in places:
            assert place > at
            value = words[place - 1]
            while value in said:
                value = said[value]
            assert words[place] == value
            values.add(value)
    assert len(values) > 10


def documents_too_short_for_their_task_are_refused_test():
    with pytest.raises(ValueError, match="30 words are too few for tracking"):
        document("tracking", 0, 30)


def right_answers_are_counted_at_their_places_test(tmp_path, monkeypatch):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    params, config = build(vocab_size=tokenizer.vocab_size)
    said = []

    def knows(params, config, prompts, answers, policy, **options):
        scored = score_answers(params, config, prompts, answers, policy, **options)
        names = set(tokenizer.encode(" ".join(recall.NAMES)))
        marked = []
        for prompt, answer, each in zip(prompts, answers, scored, strict=True):
            assert len(prompt) + len(answer) == 1 + LENGTH and prompt[-1] in names
            after_names = [
                i for i in range(len(answer)) if (prompt + answer)[len(prompt) + i - 1] in names
            ]
            first = np.isin(np.arange(len(answer)), after_names[1:])  # all but the first
            marked.append(each._replace(first=first))
            said.append(len(after_names))
        return marked

    monkeypatch.setattr(recall, "score_answers", knows)
    for policy, ratio in ((Dense(), 1.0), (Window(23), LENGTH / 23)):
        share = accuracy(params, config, tokenizer, "recall", policy, seeds=range(5), length=LENGTH)
        assert share == (pytest.approx(11 / 12), pytest.approx(ratio))
    assert set(said) == {12}
