"""The layers of the house: what a module reaches through its imports, and no room too long.

    doors -> serving -> inference
    doors -> {training, inference, interop, evaluation, baselines}
          -> checkpoints -> policies -> {model, data, pallas_kernels} -> core

`config`, `errors`, `fields`, `files`, `commands` and `processes` serve every layer but `core` and
`pallas_kernels`, which know no other. A module reaches all that importing it loads: what it
imports, and what that imports in turn. Imports inside functions load later; they keep the same
rules, but for those in `LAZY`.
"""

import ast
import collections
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("dmc_jax", "pallas_kernels", "benchmarks", "experiments", "configs")
SOURCES = (*PRODUCT, "tests")
MAX_LINES = 420

FLOWS = {"training", "inference", "interop", "evaluation", "baselines", "serving"}
COMMON = {"package", "config", "errors", "fields", "files", "commands", "processes"}
MODEL = COMMON | {"model", "pallas_kernels", "core"}
DATA = COMMON | {"data", "core"}
POLICIES = MODEL | DATA | {"policies"}
CHECKPOINTS = POLICIES | {"checkpoints"}
LIBRARY = CHECKPOINTS | FLOWS

# What each layer may reach of the project. No set holds "door": nothing imports a door.
MAY_REACH = {
    "door": LIBRARY,
    **{flow: CHECKPOINTS | {flow} for flow in FLOWS},
    "training": CHECKPOINTS | {"training", "evaluation"},
    "serving": CHECKPOINTS | {"inference", "serving"},  # and no engine knows that it is served
    "checkpoints": CHECKPOINTS,
    "policies": POLICIES,
    "model": MODEL,
    "data": DATA,
    "pallas_kernels": {"pallas_kernels"},
    "core": {"package", "core"},
    "config": {"package", "config", "core", "errors", "fields"},
    "fields": {"package", "fields", "errors"},
    "files": {"package", "files"},
    "commands": {"package", "commands", "errors"},
    "processes": {"package", "processes", "errors"},
    "errors": {"package"},
    "package": {"package"},
    "configs": CHECKPOINTS | {"configs", "evaluation"},  # of whose arena it has settings
    "benchmarks": LIBRARY | {"benchmarks"},
    "experiments": LIBRARY | {"experiments", "benchmarks"},
    "tests": LIBRARY | {"tests", "experiments", "benchmarks"},
}
# The one import against the layers, where a path is not ours: module, and what a function imports.
LAZY = {("dmc_jax.checkpoints.models", "dmc_jax.interop.direct")}
CORE_MAY_USE = {"jax", "jaxtyping"} | sys.stdlib_module_names


class Import(NamedTuple):
    line: int
    module: str
    lazy: bool  # inside a function


def layer_of(module: str, root: Path) -> str | None:
    """Names the layer of a dotted module; None for a folder that the design does not know."""
    top, *rest = module.split(".")
    if top != "dmc_jax":
        return top
    if not rest:
        return "package"
    if rest[0] in COMMON:
        return rest[0]
    if (root / "dmc_jax" / f"{rest[0]}.py").is_file():
        return "door"
    return rest[0] if rest[0] in MAY_REACH else None


def is_module(dotted: str, root: Path) -> bool:
    path = root.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def name_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Yields every import in a file."""
    package = file.relative_to(root).parent.parts
    nodes = collections.deque([(ast.parse(file.read_text()), False)])
    while nodes:
        node, lazy = nodes.popleft()
        lazy |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        nodes.extend((child, lazy) for child in ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *((node.module or "").split(".") if node.module else ())))
            for alias in node.names:  # `from a import b`: b is a module of a, or a name in it
                inner = f"{base}.{alias.name}"
                yield Import(node.lineno, inner if is_module(inner, root) else base, lazy)


def packages_of(module: str) -> list[str]:
    """The packages that importing a module loads before it."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


class Graph:
    """What every module of a tree imports."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {name_of(f, root): f for f in python_files(root, SOURCES)}
        self.imports = {name: sorted(set(imports_of(f, root))) for name, f in self.files.items()}

    def loaded_by(self, module: str) -> dict[str, list[str]]:
        """All modules that importing one loads, each with the way that leads there."""
        ways = {module: [module]}
        queue = collections.deque([module])
        while queue:
            at = queue.popleft()
            targets = [one.module for one in self.imports.get(at, ()) if not one.lazy]
            above = [package for one in (at, *targets) for package in packages_of(one)]
            for target in (*targets, *above):
                if target.split(".")[0] in SOURCES and target not in ways:
                    ways[target] = [*ways[at], target]
                    queue.append(target)
        return ways

    def violations_of(self, module: str) -> Iterator[str]:
        where, layer = self.files[module].relative_to(self.root), layer_of(module, self.root)
        if layer not in MAY_REACH:
            yield f"{where}: the layout has no place for this folder"
            return
        for line, target, lazy in self.imports[module]:
            if target.split(".")[0] not in SOURCES:
                if layer == "core" and target.split(".")[0] not in CORE_MAY_USE:
                    yield f"{where}:{line}: core may not import {target}"
                continue
            if lazy and (module, target) in LAZY:
                continue
            for way in self.loaded_by(target).values():
                if layer_of(way[-1], self.root) not in MAY_REACH[layer]:
                    yield f"{where}:{line}: {layer} may not reach {' -> '.join(way)}"
                    break  # the nearest; what lies behind it may be many


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def violations(root: Path) -> list[str]:
    graph = Graph(root)
    return [line for module in graph.files for line in graph.violations_of(module)]


def every_module_reaches_only_what_is_below_it_test():
    assert violations(ROOT) == []


def imports_against_the_layers_are_still_there_and_inside_functions_test():
    graph = Graph(ROOT)
    found = {(module, x.module) for module, of in graph.imports.items() for x in of if x.lazy}
    assert found >= LAZY


def decoding_reaches_neither_training_nor_interop_test():
    reached = {layer_of(module, ROOT) for module in Graph(ROOT).loaded_by("dmc_jax.decode")}
    assert {"inference", "checkpoints", "model"} <= reached
    assert not reached & (FLOWS - {"inference"})


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
    "dmc_jax/files.py": "import os",
    "dmc_jax/commands.py": "from dmc_jax.errors import UserError",
    "dmc_jax/config.py": "from dmc_jax.core.dmc import DMCSettings\nfrom dmc_jax import errors",
    "dmc_jax/train.py": "from absl import app\nfrom . import config\nimport dmc_jax.training.loop",
    "dmc_jax/core/dmc.py": "import math\nimport jax.numpy as jnp\nfrom dmc_jax.core import rope",
    "dmc_jax/core/rope.py": "import jax\nfrom jaxtyping import Array",
    "dmc_jax/model/llama.py": "import flax\nfrom dmc_jax.core import dmc\nimport dmc_jax.config",
    "dmc_jax/data/loader.py": "import numpy\nfrom dmc_jax.files import write_text",
    "dmc_jax/policies/dmc.py": "from dmc_jax.model import llama\nimport dmc_jax.core.dmc",
    "dmc_jax/checkpoints/models.py": (
        "import dmc_jax.policies.dmc\ndef f():\n    from dmc_jax.interop.direct import g"
    ),
    "dmc_jax/training/loop.py": "from . import step\nfrom ..evaluation import perplexity",
    "dmc_jax/training/step.py": "import optax\nfrom pallas_kernels import plan",
    "dmc_jax/inference/engine.py": "import dmc_jax.checkpoints.models\nfrom dmc_jax import errors",
    "dmc_jax/serving/app.py": "import starlette\nfrom dmc_jax.inference import engine",
    "dmc_jax/interop/direct.py": "from dmc_jax.checkpoints.models import f",
    "dmc_jax/evaluation/perplexity.py": "from dmc_jax.policies import dmc",
    "pallas_kernels/__init__.py": "",
    "pallas_kernels/plan.py": "import jax\nimport triton",
    "pallas_kernels/bench.py": "from pallas_kernels.plan import split",
    "benchmarks/speed.py": "from dmc_jax.inference import engine\nfrom pallas_kernels import plan",
    "experiments/demo.py": "import dmc_jax\nfrom benchmarks import speed",
    "configs/tiny.py": "import ml_collections\nimport dmc_jax.model.llama",
    "tests/core/dmc_test.py": "import pytest\nfrom dmc_jax.core import dmc",
}

BAD_FILES = [
    ("core/bad.py", "import flax", "core may not import flax"),
    ("core/bad.py", "import numpy", "core may not import numpy"),
    ("core/bad.py", "def f():\n    import optax", "core/bad.py:2: core may not import optax"),
    ("core/bad.py", "from dmc_jax.errors import UserError", "core may not reach dmc_jax.errors"),
    ("core/bad.py", "from dmc_jax import config", "core may not reach dmc_jax.config"),
    (
        "core/bad.py",
        "def f():\n    from ..model import llama",
        "2: core may not reach",
    ),
    ("core/bad.py", "import pallas_kernels.plan", "core may not reach pallas_kernels.plan"),
    ("config.py", "import dmc_jax.model.llama", "config may not reach dmc_jax.model.llama"),
    ("errors.py", "import dmc_jax.config", "errors may not reach dmc_jax.config"),
    ("commands.py", "import dmc_jax.files", "commands may not reach dmc_jax.files"),
    ("model/bad.py", "from dmc_jax.training import step", "model may not reach dmc_jax.training"),
    ("model/bad.py", "import dmc_jax.policies.dmc", "model may not reach dmc_jax.policies.dmc"),
    ("data/bad.py", "from dmc_jax.model import llama", "data may not reach dmc_jax.model.llama"),
    ("policies/bad.py", "import dmc_jax.checkpoints.models", "policies may not reach dmc_jax.ch"),
    ("checkpoints/bad.py", "import dmc_jax.interop.direct", "may not reach dmc_jax.interop.direct"),
    (
        "checkpoints/bad.py",
        "def f():\n    import dmc_jax.interop.direct",
        "bad.py:2: checkpoints may not reach dmc_jax.interop.direct",
    ),
    ("training/bad.py", "import dmc_jax.inference.engine", "training may not reach dmc_jax.inf"),
    ("training/bad.py", "import dmc_jax.interop.direct", "training may not reach dmc_jax.interop"),
    ("inference/bad.py", "from ..training import step", "inference may not reach dmc_jax.training"),
    ("inference/bad.py", "import dmc_jax.serving.app", "inference may not reach dmc_jax.serving"),
    ("evaluation/bad.py", "import dmc_jax.training.step", "evaluation may not reach dmc_jax.tr"),
    ("interop/bad.py", "import dmc_jax.inference.engine", "interop may not reach dmc_jax.infer"),
    ("training/bad.py", "from dmc_jax import train", "training may not reach dmc_jax.train"),
    ("plan.py", "from dmc_jax.train import main", "door may not reach dmc_jax.train"),
    ("../experiments/bad.py", "import dmc_jax.train", "experiments may not reach dmc_jax.train"),
    ("../benchmarks/bad.py", "import dmc_jax.train", "benchmarks may not reach dmc_jax.train"),
    ("../benchmarks/bad.py", "import experiments.demo", "benchmarks may not reach experiments"),
    ("../configs/bad.py", "import dmc_jax.training.step", "configs may not reach dmc_jax.training"),
    ("../tests/bad_test.py", "from dmc_jax.train import main", "tests may not reach dmc_jax.train"),
    ("../pallas_kernels/bad.py", "import dmc_jax", "pallas_kernels may not reach dmc_jax"),
    ("utils/bad.py", "", "the layout has no place for this folder"),
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
    name = name.removeprefix("../") if name.startswith("../") else f"dmc_jax/{name}"
    plant(tmp_path, GOOD_TREE | {name: text})
    [found] = [line for line in violations(tmp_path) if line.startswith(name)]
    assert complaint in found


def the_checker_follows_imports_and_tells_the_way_test(tmp_path):
    # Of the steps on the way only the last is not allowed by itself.
    plant(tmp_path, GOOD_TREE | {"dmc_jax/model/llama.py": "from dmc_jax.training import step"})
    found = violations(tmp_path)
    assert any(
        line.startswith("dmc_jax/inference/engine.py:1: inference may not reach")
        and line.endswith("dmc_jax.policies.dmc -> dmc_jax.model.llama -> dmc_jax.training.step")
        for line in found
    ), found


def what_a_package_imports_counts_for_all_its_modules_test(tmp_path):
    plant(tmp_path, GOOD_TREE | {"dmc_jax/__init__.py": "import dmc_jax.model.llama"})
    found = violations(tmp_path)
    assert any(line.startswith("dmc_jax/core/dmc.py:3: core may not reach") for line in found)
    assert any(line.startswith("dmc_jax/__init__.py:1: package may not") for line in found)
