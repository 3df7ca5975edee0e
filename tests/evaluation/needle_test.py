"""A needle is whole, between two sentences, as deep as asked; what is found is what was hidden."""

import re

import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.evaluation.answers import Scored
from dmc_jax.evaluation.needle import (
    NEEDLES,
    NEW_TOKENS,
    Trial,
    by_depth,
    essay_needle,
    found,
    passkey,
    trials,
)
from tests.evaluation.byte_tokenizer import ByteTokenizer

ESSAYS = ["One thing is small. Two are more. " * 9, "Here is another essay. It ends soon. " * 9]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def made(task="passkey", length=600, depths=(0, 50, 100), count=2, chat=None, essays=ESSAYS):
    options = {"length": length, "depths": depths, "count": count, "chat": chat}
    return trials(task, essays, ByteTokenizer(), **options)


def text_of(trial):
    return ByteTokenizer().decode(trial.prompt)


@pytest.mark.parametrize("task", NEEDLES)
@pytest.mark.parametrize("length", [600, 2000])  # the essays have 600 characters together
def a_needle_is_hidden_between_sentences_at_its_depth_test(task, length):
    for trial in made(task, length, depths=(0, 37.5, 80, 100)):
        [needle] = re.findall(
            r"The pass key is \d{5}\. Remember it\.|The best.*?day\.", text_of(trial)
        )
        context, asked = text_of(trial).split("\n\n")
        at = context.index(needle)
        before, after = context[:at], context[at + len(needle) :]
        share = at / (len(context) - len(needle))
        # Down to the last full stop: no sentence is longer than 22 characters.
        assert trial.depth / 100 - 22 / (length - 300) <= share <= trial.depth / 100 + 0.01
        assert before == "" or trial.depth == 100 or before.endswith(". ")
        assert (after == "") == (trial.depth == 100)
        assert needle not in before + after
        assert asked.startswith("What is the ")


@pytest.mark.parametrize("task", NEEDLES)
def a_prompt_fills_its_length_up_to_the_room_for_an_answer_test(task):
    for trial in made(task, depths=(0, 33, 100)):
        assert 600 - NEW_TOKENS - 2 <= len(trial.prompt) <= 600 - NEW_TOKENS


def the_answer_follows_the_prompt_and_holds_the_key_words_test():
    trial = made()[0]
    answer = ByteTokenizer().decode(trial.answer)
    assert (answer,) == trial.keywords and text_of(trial).endswith("\nThe pass key is ")
    trial = made("needle")[0]
    answer = ByteTokenizer().decode(trial.answer)
    assert f"The best thing to do in San Francisco is{answer}." in text_of(trial)
    assert text_of(trial).endswith("\nThe best thing to do in San Francisco is")
    assert found(answer, trial.keywords) == 1.0


def trials_differ_in_haystack_and_key_and_are_the_same_again_test():
    one, other = made(depths=(50,))
    assert text_of(one).startswith("One thing") and text_of(other).startswith("Here is")
    assert one.keywords != other.keywords
    assert made(depths=(50,)) == [one, other]
    keys = {passkey(str(n)).answer for n in range(50)}
    assert len(keys) > 45 and all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys)


def a_chat_model_is_asked_as_a_user_asks_and_its_answer_begun_test(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    for trial in made(chat=tmp_path / "tokenizer.json"):
        said, begun = text_of(trial).split("<assistant>")
        assert said.startswith("<user>") and said.endswith("\n\nWhat is the pass key?")
        assert begun == "The pass key is "
        assert 600 - NEW_TOKENS - 2 <= len(trial.prompt) <= 600 - NEW_TOKENS


def tokens_that_reach_over_the_seam_are_part_of_the_answer_test():
    class Joined(ByteTokenizer):
        """Reads a space and a digit as one."""

        def encode(self, text):
            return [3 + ord(c) if c else 3 for c in re.sub(r" (\d)", r"\1", text)]

    options = {"length": 600, "depths": (50,), "count": 1, "chat": None}
    [trial] = trials("passkey", ESSAYS, Joined(), **options)
    assert Joined().decode(trial.prompt).endswith("\nThe pass key is")
    assert Joined().decode(trial.answer) == trial.keywords[0]


@pytest.mark.parametrize(
    "text, share",
    [
        (" eat a SANDWICH and sit in Dolores Park on a sunny day.", 1.0),
        ("Dolores\nPark", 0.0),
        ("sandwiches in Dolores Park", 1 / 3),
        ("", 0.0),
    ],
)
def key_words_are_found_whole_test(text, share):
    assert found(text, essay_needle("").keywords) == pytest.approx(share)


def a_key_within_another_number_is_not_found_test():
    assert found("is 12345.", ("12345",)) == 1.0
    assert found("is 123456, 012345 or 12 345", ("12345",)) == 0.0


def figures_are_means_over_the_trials_of_a_depth_test():
    some = [Trial(depth, [1], [5, 6], ("key",)) for depth in (50, 0, 50)]
    scored = [
        Scored(np.array([x, x + 1.0]), np.array([True, first]))
        for x, first in ((1.0, False), (2.0, True), (3.0, True))
    ]
    assert by_depth(some, ["a key", "no", "keys"], scored) == {
        "found": {"0": 0.0, "50": 0.5},
        "nats": {"0": 2.5, "50": 2.5},
        "first": {"0": 1.0, "50": 0.75},
    }


def a_length_without_room_and_a_depth_that_is_none_are_refused_test():
    with pytest.raises(UserError, match=r"depths: expected percentages, 0 to 100, got \[0, 101\]"):
        made(depths=(0, 101))
    with pytest.raises(UserError, match="length: 60 tokens leave no room for essays"):
        made(length=60)
