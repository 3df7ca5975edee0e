"""The device that kernels are built for: the present one, or one that stands in for it."""

import dataclasses

import jax

# Compute capabilities that a device's name implies, for compiling where no such device is.
_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel needs to know of its device.

    Attributes:
        platform: as JAX calls it: "cpu", "gpu", "tpu".
        kind: the device's name.
        cores: multiprocessors; 1 where JAX does not say.
        capability: of an NVIDIA GPU, 90 for compute capability 9.0; None for other devices.
    """

    platform: str
    kind: str
    cores: int
    capability: int | None


def current() -> Target:
    """Say what the computation that is being traced will run on.

    That is the device of the abstract mesh in use (`jax.sharding.use_abstract_mesh`), where that
    mesh names one: so is a program lowered for a GPU on a machine that has none. Otherwise it is
    the first device of JAX's default backend; `jax.default_device` is not looked at.

    Raises:
        ValueError: an abstract GPU whose compute capability is not known here.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        device = jax.local_devices()[0]
        capability = None
        if device.platform == "gpu" and "." in str(device.compute_capability):
            capability = int(str(device.compute_capability).replace(".", ""))
        return Target(
            device.platform, device.device_kind, getattr(device, "core_count", 1) or 1, capability
        )
    capability = None
    if abstract.platform == "gpu":
        known = [name for name in _CAPABILITIES if name in abstract.device_kind]
        if not known:
            raise ValueError(
                f"the compute capability of an abstract {abstract.device_kind!r} is not known;"
                f" expected a device whose name contains {', '.join(_CAPABILITIES)}"
            )
        capability = _CAPABILITIES[known[0]]
    return Target(abstract.platform, abstract.device_kind, abstract.num_cores or 1, capability)
