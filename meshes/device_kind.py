"""The kind of device that a program is traced for, which may be absent from this machine."""

import jax
from jax.sharding import AbstractMesh, Mesh

GPUS = ("gpu", "cuda", "rocm")
"""Names of the platforms of GPUs."""


def is_nvidia(kind: str | None = None) -> bool:
    """Return whether devices of a kind are NVIDIA GPUs; those of the mesh in context if left out."""
    return (kind or device_kind()).startswith("NVIDIA")


def device_kind() -> str:
    """Return the kind of the devices of the mesh in context, or of jax's own devices: "cpu", "NVIDIA H200"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Return the platform of a mesh's devices: "cpu", "gpu"."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return getattr(mesh.abstract_device, "platform", None) or "cpu"
