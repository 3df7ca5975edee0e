"""Prompts in a file and sizes in words, with one clear complaint where they are neither."""

import io
import json

import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference.prompts import parse_bytes, read_prompts
from dmc_jax.inference.sampling import SamplingParams

DEFAULTS = SamplingParams(max_new_tokens=7, top_k=3)


def a_line_is_a_text_or_an_object_that_changes_the_defaults_test(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n{"prompt": "zw\u00f6i", "seed": 4, "stop": ["a", "b"]}\n', "utf-8")
    assert read_prompts(path, DEFAULTS) == [
        ("one", DEFAULTS),
        ("zwöi", SamplingParams(max_new_tokens=7, top_k=3, seed=4, stop=("a", "b"))),
    ]


def a_hyphen_is_standard_input_test(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps("from a pipe")))
    assert read_prompts("-", DEFAULTS) == [("from a pipe", DEFAULTS)]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "has no prompt"),
        ('"a"\nb', "line 2 is not JSON"),
        ("3", "line 1: expected a string"),
        ('{"text": "a"}', 'a text "prompt"'),
        ('{"prompt": "a", "top": 3}', "line 1: no field 'top'; there is .*top_k"),
        ('"a"\n{"prompt": "a", "top_p": 3}', "line 2: top_p: expected a probability"),
        ('{"prompt": "a", "seed": "b"}', "line 1: "),
    ],
)
def a_bad_line_is_named_test(text, complaint, tmp_path):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_prompts(tmp_path / "prompts", DEFAULTS)


def a_missing_file_is_named_test(tmp_path):
    with pytest.raises(UserError, match="cannot read prompts from .*absent"):
        read_prompts(tmp_path / "absent", DEFAULTS)


@pytest.mark.parametrize(
    "text, size",
    [("1048576", 2**20), ("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("3g", 3e9)],
)
def sizes_are_read_in_either_kind_of_unit_test(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 TiBs", "1e9"])
def what_is_no_size_is_refused_test(text):
    with pytest.raises(UserError, match="expected a size such as 2GiB"):
        parse_bytes(text)
