"""A notebook is its script, cell for cell: `make notebooks`."""

import ast
from pathlib import Path

import jupytext
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*.ipynb"))


def cells(file: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]


def the_experiments_that_need_no_checkout_have_notebooks_test():
    scripts = {file.stem: file.read_text() for file in EXPERIMENTS.glob("*.py")}
    alone = {name for name, text in scripts.items() if "from benchmarks" not in text}
    assert {file.stem for file in NOTEBOOKS} == alone


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def a_notebook_has_the_cells_of_its_script_and_no_outputs_test(file):
    assert cells(file) == cells(file.with_suffix(".py"))
    notebook = jupytext.read(file)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def a_notebooks_first_code_installs_the_package_where_it_is_missing_test(file, monkeypatch):
    """And no cell before it needs the package."""
    first = next(source for kind, source in cells(file) if kind == "code")
    imported = [
        alias.name
        for node in ast.walk(ast.parse(first))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == ["Path", "importlib.util", "subprocess", "sys"]
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []  # it is there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(first, {})
    assert [command[1:] for command in commands] == [["-m", "pip", "install", "--quiet", ".."]]
