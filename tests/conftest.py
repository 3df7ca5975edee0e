"""Eight fake CPU devices, so that sharding is tested on any machine; programs compile fast, once.

The variables reach the programs that tests start, too. Annotations are run.
"""

import importlib.metadata
import os
import pathlib
import tempfile

import pytest

from tests import annotations

# XLA reads these once, when jax first starts a backend; what the caller set (a GPU, say) is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = ["--xla_force_host_platform_device_count=8"]

# Most of a test's time is compilation, half of that LLVM's optimizations, which tiny models do not
# repay. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 the machine code is that of real runs.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
        _flags.append("--xla_cpu_parallel_codegen_split_count=1")
        # The older way to generate code compiles three times as fast; XLA dropped it in 0.11.1.
        if importlib.metadata.version("jaxlib") in ("0.10.2", "0.11.0"):
            _flags.append("--xla_cpu_use_fusion_emitters=false")

_set = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_set, *(flag for flag in _flags if flag.partition("=")[0] not in _set)]
).strip()

# Runs that are resumed, sharded or started over compile the same programs again and again: keep
# them for the length of this session (and not longer, so that no test depends on an earlier one).
# Each pytest worker has a folder of its own: JAX does not write a kept program in one piece.
_programs = tempfile.TemporaryDirectory(prefix="dmc_jax_programs_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

annotations.run()


@pytest.fixture
def annotations_aside():
    """For tests of what a function says of bad input: its annotations would say it first."""
    annotations.look_away(True)
    yield
    annotations.look_away(False)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Let go of compiled programs: each takes several of the 65,530 mappings of a process.

    Where there are no more, XLA ends by a segmentation fault.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > 20_000:
        import jax  # after the variables above

        jax.clear_caches()


def pytest_unconfigure(config):
    """Remove what was kept."""
    _programs.cleanup()
