"""HumanEval: a body that follows the head is put together with it, and judged by the tests."""

import gzip
import json

import pytest

from dmc_jax.errors import UserError
from dmc_jax.evaluation.human_eval import (
    STOP,
    judged,
    load_problems,
    prompt_for,
    solution_of,
)
from tests.evaluation.byte_tokenizer import ByteTokenizer

ENTRY = {
    "task_id": "HumanEval/0",
    "prompt": '\nfrom typing import List\n\n\ndef total(x: List[int]):\n    """ Add up. """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(x)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2, 4]) == 7\n",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def packed(*entries):
    return gzip.compress("\n".join(map(json.dumps, entries)).encode())


@pytest.fixture
def problem():
    [problem] = load_problems(packed(ENTRY))
    return problem


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("\n    return sum(x)", "passed"),
        (
            "\n    result = 0\n    for each in x:\n        result += each\n    return result\n",
            "passed",
        ),
        ("\n    return 7  # a comment", "passed"),
        ("\n    return 8", "failed"),
        ("\n    pass", "failed"),
        ("\nreturn sum(x)", "failed"),
        ("", "failed"),
        ("\n    exit(0)", "failed"),
        ("\n    print(7)", "failed"),
    ],
)
def a_body_is_judged_by_the_tests_test(problem, completion, expected):
    assert judged(problem, completion) == expected


def the_known_body_follows_the_prompt_and_passes_test(problem):
    body = ByteTokenizer().decode(solution_of(problem, ByteTokenizer()))
    assert body == "\n    return sum(x)" and judged(problem, body) == "passed"


def a_base_model_goes_on_where_the_docstring_ends_test(problem):
    text = ByteTokenizer().decode(prompt_for(problem, ByteTokenizer(), None))
    assert text == ENTRY["prompt"].strip() and text.endswith('""" Add up. """')


def a_chat_model_is_asked_and_its_answer_begun_up_to_the_same_place_test(problem, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    ids = prompt_for(problem, ByteTokenizer(), tmp_path / "tokenizer.json")
    said, begun = ByteTokenizer().decode(ids).split("<assistant>")
    assert said.startswith("<user>Write a solution to the following problem")
    assert problem.head in said
    assert begun == f"Here is the completed function:\n```python\n{problem.head}"


def a_body_goes_on_until_something_else_begins_at_the_margin_test():
    assert {"\nclass", "\ndef", "\n#", "\nif", "\nprint"} < set(STOP)
    assert not any(end in "\n    if x:\n        print(x)\n    # so\n    return x" for end in STOP)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", packed(ENTRY)[:-20], gzip.compress(b"{}"), packed({"prompt": ""}), packed(3)],
    ids=["empty", "text", "cut", "no problem", "half a problem", "a number"],  # gzip has the time
)
def other_files_are_refused_in_a_line_test(content):
    with pytest.raises(UserError, match="not HumanEval's problems"):
        load_problems(content)
