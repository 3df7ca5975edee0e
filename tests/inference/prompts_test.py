"""Prompts in a file and sizes in words, with one clear complaint where they are neither."""

import dataclasses
import io
import json
import re

import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference.output import as_json, check_output, results_file
from dmc_jax.inference.prompts import PromptLine, parse_bytes, read_prompts, read_text
from dmc_jax.inference.requests import Result
from dmc_jax.inference.sampling import SamplingParams

DEFAULTS = SamplingParams(max_new_tokens=7, top_k=3)


def write(path, text):
    path.write_bytes(text.encode())
    return path


def a_line_is_a_text_or_an_object_that_changes_the_defaults_test(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n{"prompt": "zw\u00f6i", "seed": 4, "stop": ["a", "b"]}\n', "utf-8")
    assert read_prompts(path, DEFAULTS) == [
        PromptLine("one", DEFAULTS, 1),
        PromptLine("zwöi", dataclasses.replace(DEFAULTS, seed=4, stop=("a", "b")), 3),
    ]


def a_line_may_ask_for_a_ratio_which_is_not_the_one_that_a_result_came_to_test(tmp_path):
    result = Result("b", (1,), "stop", 1, 1, 1.7, 2, 2, 3, 0.1, 0.0)
    came_to = as_json(0, PromptLine("a", DEFAULTS, 1), result, None, ascii_only=False)
    lines = ['{"prompt": "a", "ratio": 3}', '{"prompt": "a", "threshold": -1}', came_to]
    lines = read_prompts(write(tmp_path / "prompts", "\n".join(lines)), DEFAULTS)
    assert [(x.error, x.params.ratio, x.params.threshold) for x in lines] == [
        (None, 3, None),
        (None, None, -1),
        (None, None, None),
    ]


def a_hyphen_is_standard_input_test(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps("from a pipe")))
    assert read_prompts("-", DEFAULTS) == [PromptLine("from a pipe", DEFAULTS, 1)]


ODD = "\u2028 \u2029 \u0085 \x0b \x0c \x1c \x1d \x1e"


def only_a_line_feed_ends_a_line_test(tmp_path):
    path = write(tmp_path / "prompts", f'\ufeff"{ODD}"\r\n\r\n{json.dumps(ODD)}')
    assert [line[0] for line in read_prompts(path, DEFAULTS)] == [ODD, ODD]


def token_ids_are_a_prompt_test(tmp_path):
    path = write(tmp_path / "prompts", '{"prompt": [1, 5, 5]}\n{"prompt": [1, true]}\n')
    ids, bad = read_prompts(path, DEFAULTS)
    assert ids.prompt == [1, 5, 5] and ids.error is None
    assert "line 2: expected a string" in bad.error


@pytest.mark.parametrize("prompt", ["", ODD, "é \ufeff \ud83d", [1, 2]])
def what_decode_writes_it_reads_test(prompt, tmp_path):
    result = Result(ODD, (1,), "stop", 1, 1, 1.0, 2, 2, 3, 0.1, 0.0)
    line = PromptLine(prompt, DEFAULTS, 1)
    path = tmp_path / "output"
    with results_file(check_output(str(path), "replace", [])) as write_result:
        write_result(1, as_json(1, line, None, "line 2: bad", ascii_only=False))
        write_result(0, as_json(0, line, result, None, ascii_only=False))
    lines = read_prompts(path, DEFAULTS) if prompt != "é \ufeff \ud83d" else []
    assert [line.prompt for line in lines] == [prompt] * len(lines)
    assert [json.loads(line)["index"] for line in path.read_text().split("\n")[:-1]] == [0, 1]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "has no prompt"),
        ("b", "line 1: .* not JSON"),
        ("[" * 100_000, "line 1: .* not JSON: nested too deeply"),
        ("3", "line 1: expected a string"),
        ('{"text": "a"}', 'a text "prompt"'),
        ('{"prompt": "a", "top": 3}', "line 1: no field 'top'; there is .*top_k"),
        ('\n{"prompt": "a", "top_p": 3}', "line 2: top_p: expected a probability"),
        ('{"prompt": "a", "seed": "b"}', "line 1: seed: expected a whole number"),
        ('{"prompt": "a", "stop": "b"}', "line 1: stop: expected a list of texts"),
        ('{"prompt": "a", "top_p": NaN}', "line 1: top_p: expected a probability.*NaN"),
        ('"a\\ud83d"', r"line 1: character 2 of the prompt is .ud83d, half of a surrogate pair"),
    ],
)
def a_bad_line_is_named_and_costs_the_others_nothing_test(text, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        read_prompts(write(tmp_path / "prompts", text), DEFAULTS)
    if text:
        path = write(tmp_path / "prompts", f'{text}\n"fine"\n')
        bad, fine = read_prompts(path, DEFAULTS)
        assert re.search(complaint, bad.error)
        assert (fine.prompt, fine.error) == ("fine", None)


def what_is_not_utf8_is_named_with_its_line_test(tmp_path):
    (tmp_path / "prompts").write_bytes(b'"a"\n"\xe9"\n')
    with pytest.raises(UserError, match=r"not UTF-8 \(line 2\)"):
        read_prompts(tmp_path / "prompts", DEFAULTS)


def a_text_file_keeps_its_line_ends_test(tmp_path):
    assert read_text(write(tmp_path / "prompt", "\ufeffa\r\nb\r"), "the prompt") == "a\r\nb\r"


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
