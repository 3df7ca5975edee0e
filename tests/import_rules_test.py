"""The layers of the house: who may import whom, and no room too long.

    doors -> {training, inference, interop, evaluation, baselines}
          -> checkpoints -> policies -> {model, data, pallas_kernels} -> core

`config` and `errors` serve every layer but `core` and `pallas_kernels`, which know no other.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("dmc_jax", "pallas_kernels", "experiments", "configs", "tests")
PRODUCT = ("dmc_jax", "pallas_kernels", "experiments", "configs")
MAX_LINES = 420

FLOWS = {"training", "inference", "interop", "evaluation", "baselines"}
PARTS = {"checkpoints", "policies", "model", "data", "pallas_kernels"}
COMMON = {"config", "errors", "files", "commands"}
LIBRARY = FLOWS | PARTS | COMMON | {"core"}

# What each layer may import of the project. No set holds "door": nothing imports a door.
ALLOWED = {
    "door": LIBRARY,
    **{flow: LIBRARY for flow in FLOWS},
    "training": LIBRARY - {"inference"},
    "inference": LIBRARY - {"training"},
    "checkpoints": PARTS | COMMON | {"core"},
    "policies": PARTS - {"checkpoints"} | COMMON | {"core"},
    "model": PARTS - {"checkpoints", "policies"} | COMMON | {"core"},
    "data": PARTS - {"checkpoints", "policies"} | COMMON | {"core"},
    "pallas_kernels": {"pallas_kernels"},
    "core": {"core"},
    "config": {"core", "errors"},
    "errors": set(),
    "files": set(),
    "commands": {"errors"},
    "package": set(),
    "experiments": LIBRARY | {"experiments", "configs"},
    "configs": LIBRARY | {"configs"},
    "tests": LIBRARY | {"experiments", "configs", "tests"},
}
CORE_MAY_USE = {"jax", "numpy", "jaxtyping"} | sys.stdlib_module_names


def layer_of(module: str, root: Path) -> str | None:
    """Names the layer of a dotted module; None for a folder that the design does not know."""
    top, *rest = module.split(".")
    if top != "dmc_jax":
        return top
    if not rest or rest[0] == "__init__":
        return "package"
    if rest[0] in COMMON:
        return rest[0]
    if (root / "dmc_jax" / f"{rest[0]}.py").is_file():
        return "door"
    return rest[0] if rest[0] in ALLOWED else None


def is_module(dotted: str, root: Path) -> bool:
    path = root.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted module) of every import in a file, those inside functions included."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *((node.module or "").split(".") if node.module else ())))
            for alias in node.names:  # `from a import b`: b is a module of a, or a name in it
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if is_module(inner, root) else base


def violations_in(file: Path, root: Path) -> Iterator[str]:
    where = file.relative_to(root)
    layer = layer_of(".".join(where.with_suffix("").parts), root)
    if layer is None:
        yield f"{where}: the layout has no place for this folder"
        return
    for line, module in imports_of(file, root):
        top = module.split(".")[0]
        if top in SOURCES:
            if layer_of(module, root) not in ALLOWED[layer]:
                yield f"{where}:{line}: {layer} may not import {module}"
        elif layer == "core" and top not in CORE_MAY_USE:
            yield f"{where}:{line}: core may not import {module}"


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def violations(root: Path) -> list[str]:
    return [line for file in python_files(root, SOURCES) for line in violations_in(file, root)]


def every_import_goes_down_the_layers_test():
    assert violations(ROOT) == []


def no_product_file_outgrows_its_room_test():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in python_files(ROOT, PRODUCT)
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


# One tree with every layer; each case adds one file or replaces one.
GOOD_TREE = {
    "dmc_jax/__init__.py": "",
    "dmc_jax/errors.py": "import sys",
    "dmc_jax/config.py": "from dmc_jax.core.dmc import DMCSettings\nfrom dmc_jax import errors",
    "dmc_jax/train.py": "from absl import app\nfrom . import config\nimport dmc_jax.training.loop",
    "dmc_jax/core/dmc.py": "import math\nimport jax.numpy as jnp\nfrom dmc_jax.core import rope",
    "dmc_jax/core/rope.py": "import numpy\nfrom jaxtyping import Array",
    "dmc_jax/model/llama.py": "import flax\nfrom dmc_jax.core import dmc\nimport dmc_jax.config",
    "dmc_jax/training/loop.py": "from . import step\nfrom ..model.llama import Llama",
    "dmc_jax/training/step.py": "import optax\nfrom pallas_kernels import plan",
    "dmc_jax/inference/engine.py": "from dmc_jax.model import llama\nfrom dmc_jax import errors",
    "dmc_jax/evaluation/report.py": "from dmc_jax.inference import engine",
    "pallas_kernels/plan.py": "import jax\nimport triton",
    "pallas_kernels/bench.py": "from pallas_kernels.plan import split",
    "experiments/demo.py": "from dmc_jax.training import loop",
    "configs/tiny.py": "import ml_collections",
    "tests/core/dmc_test.py": "import pytest\nfrom dmc_jax.core import dmc",
}

BAD_FILES = [
    ("dmc_jax/core/bad.py", "import flax", "core may not import flax"),
    (
        "dmc_jax/core/bad.py",
        "from dmc_jax.errors import UserError",
        "core may not import dmc_jax.err",
    ),
    ("dmc_jax/core/bad.py", "from dmc_jax import config", "core may not import dmc_jax.config"),
    ("dmc_jax/core/bad.py", "from ..model import llama", "core may not import dmc_jax.model.llama"),
    (
        "dmc_jax/core/bad.py",
        "def f():\n    import optax",
        "core/bad.py:2: core may not import optax",
    ),
    (
        "dmc_jax/core/bad.py",
        "import pallas_kernels.plan",
        "core may not import pallas_kernels.plan",
    ),
    (
        "dmc_jax/config.py",
        "import dmc_jax.model.llama",
        "config may not import dmc_jax.model.llama",
    ),
    ("dmc_jax/errors.py", "import dmc_jax.config", "errors may not import dmc_jax.config"),
    ("dmc_jax/__init__.py", "from dmc_jax.core import dmc", "package may not import dmc_jax.core"),
    (
        "dmc_jax/model/bad.py",
        "from dmc_jax.training import step",
        "model may not import dmc_jax.tr",
    ),
    (
        "dmc_jax/data/bad.py",
        "from dmc_jax import inference",
        "data may not import dmc_jax.inference",
    ),
    ("dmc_jax/training/bad.py", "import dmc_jax.inference.engine", "training may not import"),
    ("dmc_jax/inference/bad.py", "from ..training import step", "inference may not import"),
    (
        "dmc_jax/training/bad.py",
        "from dmc_jax import train",
        "training may not import dmc_jax.train",
    ),
    ("dmc_jax/plan.py", "from dmc_jax.train import main", "door may not import dmc_jax.train"),
    ("experiments/bad.py", "import dmc_jax.train", "experiments may not import dmc_jax.train"),
    ("tests/bad_test.py", "from dmc_jax.train import main", "tests may not import dmc_jax.train"),
    ("pallas_kernels/bad.py", "import dmc_jax", "pallas_kernels may not import dmc_jax"),
    (
        "pallas_kernels/bad.py",
        "from dmc_jax.core import dmc",
        "pallas_kernels may not import dmc_j",
    ),
    ("dmc_jax/utils/bad.py", "", "the layout has no place for this folder"),
]


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def the_checker_accepts_a_tree_that_keeps_the_rules_test(tmp_path):
    plant(tmp_path, GOOD_TREE)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("name, text, complaint", BAD_FILES)
def the_checker_catches_a_planted_violation_test(tmp_path, name, text, complaint):
    plant(tmp_path, GOOD_TREE | {name: text})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert name.removeprefix("dmc_jax/") in found[0]
    assert complaint in found[0]
