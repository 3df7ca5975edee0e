"""Eight fake CPU devices, so that sharding is tested on any machine; each program compiled once."""

import os
import tempfile

# XLA reads both once, when jax first starts a backend; what the caller set (a GPU, say) is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

import jax

# Runs that are resumed, sharded or started over compile the same programs again and again: keep
# them for the length of this session (and not longer, so that no test depends on an earlier one).
_programs = tempfile.TemporaryDirectory(prefix="dmc_jax_programs_")
jax.config.update("jax_compilation_cache_dir", _programs.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    """Remove what was kept."""
    _programs.cleanup()
