"""Gives every test eight fake CPU devices, so that sharding is tested on any machine."""

import os

# XLA reads both once, when jax first starts a backend; what the caller set (a GPU, say) is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
