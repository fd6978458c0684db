"""Keep arrays in the pinned memory of the host beside a device, from which it copies without the processor.

An array's sharding says in which memory it lies, and its type too: `float32<host>[8]`. jax refuses to compute with it
before `to_device` has copied it. Read `../train/update/offload.py` for the use.
"""

from typing import Any

import jax
import jaxlib
from jax.sharding import Mesh, NamedSharding

from .errors import MeshError

HOST = "pinned_host"
_WRONG = "0.11.0"


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """Return the same sharding in the pinned memory of the devices' hosts.

    >>> in_host_memory(NamedSharding(mesh, PartitionSpec("data"))).memory_kind
    'pinned_host'
    """
    placed = sharding.with_memory_kind(HOST)
    if placed.memory_kind == HOST:
        return placed
    # Devices that only the compiler knows name no memories, and jax drops the kind. An abstract mesh keeps it.
    assert isinstance(sharding.mesh, Mesh)
    return NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=HOST)


def is_in_host_memory(leaf: Any) -> bool:
    """Return whether an array, or a shape with a sharding, lies in the memory of the host."""
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def to_device(x: jax.Array) -> jax.Array:
    """Copy an array into the memory of its devices, inside a jitted function; one that lies there stays."""
    return jax.device_put(x, jax.memory.Space.Device)


def to_host(x: jax.Array) -> jax.Array:
    """Copy an array into the memory of the host, inside a jitted function."""
    return jax.device_put(x, jax.memory.Space.Host)


def check_host_memory(mesh: Mesh, *, asked: str) -> None:
    """Raise unless arrays can be kept on the host by these devices and this jaxlib.

    Args:
        asked: what asks for it, such as train.offload='optimizer'.

    Raises:
        MeshError: the devices have no pinned host memory, or jaxlib copies slices of it from wrong places.
    """
    if jaxlib.__version__ == _WRONG:
        raise MeshError(
            f"{asked}: jaxlib {_WRONG} copies wrong slices of host memory, without an error (openxla/xla 46231).",
            fix="install another jaxlib, such as 0.11.1, or leave it out.",
        )
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    # Devices that only the compiler knows name none.
    if kinds and HOST not in kinds:
        raise MeshError(
            f"{asked}: {device.device_kind} devices have no {HOST} memory, only {', '.join(kinds)}.",
            fix="leave it out, or use devices that have it, such as GPUs.",
        )
