"""The kind of device that a program is traced for, which may be absent from this machine."""

import jax
from jax.sharding import AbstractMesh, Mesh

GPUS = ("gpu", "cuda", "rocm")
"""Names of the platforms of GPUs."""

_FROM_HOPPER = {"H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300"}


def is_nvidia(kind: str | None = None) -> bool:
    """Return whether devices of a kind are NVIDIA GPUs; those of the mesh in context if left out."""
    return (kind or device_kind()).startswith("NVIDIA")


def is_hopper_or_later(kind: str) -> bool:
    """Return whether devices of a kind, or of a planner's key, are NVIDIA's for data centres from Hopper on.

    >>> is_hopper_or_later("NVIDIA H200 141GB HBM3e"), is_hopper_or_later("h100-96gb"), is_hopper_or_later("a100")
    (True, True, False)
    """
    return not _FROM_HOPPER.isdisjoint(kind.upper().replace("-", " ").split())


def device_kind() -> str:
    """Return the kind of the devices of the mesh in context, or of jax's own devices: "cpu", "NVIDIA H200"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Return the platform of a mesh's devices: "cpu", "gpu"."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return getattr(mesh.abstract_device, "platform", None) or "cpu"
