"""Records of measurements: a row is made once, a file of other measurements is left alone."""

import json

import pytest

from dmc_jax.errors import UserError
from dmc_jax.evaluation.record import open_record


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "record.json"


def a_row_is_measured_once_and_kept_when_a_later_one_fails_test(file):
    record = open_record(file, {"text": "a"}, same=("text",))
    assert record.row({"method": "x"}, lambda: {"found": 1}) == {"method": "x", "found": 1}
    with pytest.raises(ZeroDivisionError):
        record.row({"method": "y"}, lambda: {"found": 1 / 0})
    said = []
    again = open_record(file, {"text": "a"}, same=("text",))
    again.report = said.append
    assert again.row({"method": "x"}, pytest.fail) == {"method": "x", "found": 1}
    again.row({"method": "y"}, lambda: {"found": 2, "each": [1, 1]})
    assert said == ['{"method": "y", "found": 2}']
    assert json.loads(file.read_text()) == {"text": "a", "rows": again.rows}
    assert len(again.rows) == 2


def files_of_gates_join_what_is_there_test(file):
    open_record(file, {"gates": {"a": 1}}, (), joins=("gates",)).write()
    record = open_record(file, {"gates": {"b": 2}}, (), joins=("gates",))
    assert record.about == {"gates": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "b", "gates": {}, "rows": []}', "was measured with another text"),
        ('{"text": "a", "gates": {"a": 2}, "rows": []}', "was measured with another a"),
        ('{"text": "a"}', "is no record of measurements"),
        ("[", "is no record of measurements"),
        ("[]", "is no record of measurements"),
    ],
)
def a_file_of_others_is_refused_and_left_alone_test(file, content, complaint):
    file.parent.mkdir()
    file.write_text(content)
    about = {"text": "a", "gates": {"a": 1}}
    with pytest.raises(UserError, match=complaint):
        open_record(file, about, same=("text",), joins=("gates",))
    assert file.read_text() == content
