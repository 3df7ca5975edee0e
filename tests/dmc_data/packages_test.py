"""Files of a package are read from where it is installed, or from its wheel, and nothing is run."""

import zipfile

import pytest

from dmc_jax.data import packages
from dmc_jax.data.packages import package_files
from dmc_jax.errors import UserError

FILES = {
    "some_texts/__init__.py": "raise RuntimeError('run')",
    "some_texts/texts/b.txt": "second",
    "some_texts/texts/a.txt": "first",
    "some_texts-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.2\n"
    "Requires-Dist: what-nobody-has",
    "some_texts-1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
    "Tag: py3-none-any",
}
RECORD = "some_texts-1.2.dist-info/RECORD"
TEXTS = {"some_texts/texts/a.txt": b"first", "some_texts/texts/b.txt": b"second"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index."""
    with zipfile.ZipFile(tmp_path / "some_texts-1.2-py3-none-any.whl", "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
        wheel.writestr(RECORD, "".join(f"{path},,\n" for path in (*FILES, RECORD)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def files_come_from_the_wheel_and_without_its_requirements_test(index):
    assert list(package_files("some-texts==1.2", "*/texts/*.txt").items()) == list(TEXTS.items())
    with pytest.raises(UserError, match=r"some-texts==1.2 has no file \*.gguf"):
        package_files("some-texts==1.2", "*.gguf")


def an_installed_package_needs_no_pip_but_only_in_the_right_version_test(index, monkeypatch):
    site = index / "site"
    with zipfile.ZipFile(index / "some_texts-1.2-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(site)
    asked = []
    monkeypatch.setattr(packages, "_downloaded", lambda *package: asked.append(package) or TEXTS)
    assert package_files("some-texts==1.2", "*/texts/*.txt") == TEXTS and not asked
    package_files("some-texts==1.3", "*.txt")
    assert asked == [("some-texts==1.3", "*.txt")]


def what_is_missing_is_said_with_what_to_do_test(index):
    with pytest.raises(UserError) as error:
        package_files("no-such-texts==0.1", "*.txt")
    said = str(error.value)
    assert "\n" not in said and "No matching distribution found for no-such-texts==0.1" in said
    assert said.endswith("run `pip install --no-deps no-such-texts==0.1` where there is a network")
