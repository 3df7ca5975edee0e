"""What `pip install .` installs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKED = ("dmc_jax", "pallas_kernels", "configs")


def can_build() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:  # Python 3.12's venv comes without
        return False


def every_package_is_installed_and_the_configs_lie_inside_test():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in PACKED
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert tools["package-dir"] == {"dmc_jax.configs": "configs"}
    assert sorted(tools["packages"]) == sorted(found | {"dmc_jax.configs"})


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="make test-all installs the setuptools to build it")
def the_installed_package_works_from_any_folder_test(tmp_path):
    source, site, folder = tmp_path / "source", tmp_path / "site", tmp_path / "folder"
    for name in PACKED:
        shutil.copytree(ROOT / name, source / name)
    (source / "dmc_jax/gates").mkdir(exist_ok=True)
    (source / "dmc_jax/gates/some_dms.safetensors").write_bytes(b"gates")
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements.txt",
        "requirements-serve.txt",
    ):
        shutil.copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", site, source], check=True, timeout=300)
    folder.mkdir()
    assert {entry.name for entry in site.iterdir() if "dist-info" not in entry.name} == {
        "bin",
        "dmc_jax",
        "pallas_kernels",
    }

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )

    dmc = str(site / "bin" / "dmc")
    listed = run(dmc)
    assert listed.returncode == 0 and "prepare_data" in listed.stdout, listed
    done = run(dmc, "prepare_data", "--output=data/stdlib", "--limit_mb=2")
    assert done.returncode == 0, done.stderr
    train = [dmc, "train", "--config=tiny_4x", "--config.stages=pretrain"]
    train += ["--config.pretrain.steps=2", "--config.eval_windows=2", "--config.data.batch=2"]
    done = run(*train)
    assert done.returncode == 0, done.stderr
    # The wrapper finds the recipe beside it, and what is missing is the data and its start.
    missing = run("-m", "dmc_jax.train", "--config=7b_8x", "--config.init_from=runs/tiny_4x")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: 7b_8x cannot start; what is missing")
    assert "data/llama2" in missing.stderr
    # Gates come along, and are found by name.
    decode = [dmc, "decode", "--checkpoint=runs/tiny_4x", "--prompt=a"]
    named, unknown = (run(*decode, f"--gates={name}") for name in ("some_dms", "magic"))
    assert f"{site}/dmc_jax/gates/some_dms.safetensors is not a file of gates" in named.stderr
    assert "magic is no file" in unknown.stderr and "some_dms" in unknown.stderr
    code = "import dmc_jax as dmc; print(dmc.__file__, dmc.load('runs/tiny_4x').config.layers)"
    loaded = run("-c", code)
    assert loaded.stdout.startswith(str(site)), loaded
