"""Compute checksums of arrays that do not depend on how they are split over devices.

The checksum is computed on the devices before a save and after a restore, so that a change is detected on any mesh. It
is a sum of integers, whose order does not matter, and costs one pass over the array:

    bits of w        [ a, b, c, d ]          device 0: h(a, 0) + h(b, 1)
    index            [ 0, 1, 2, 3 ]          device 1: h(c, 2) + h(d, 3)      sum of both, modulo 2^32
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...meshes.host_memory import to_device

_ODD = (0x9E3779B1, 0x85EBCA77)


def checksum(array: jax.Array) -> jax.Array:
    """Return a checksum as uint32[2]: sums, modulo 2^32, of two hashes of every element's bits and index.

    A random change goes undetected with probability 2^-64. The index is hashed too, so a swap of two elements is
    detected.
    """
    bits = _bits(to_device(array))
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * np.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    return jnp.stack([jnp.sum(_mix(bits ^ (index * np.uint32(odd) + np.uint32(1))), dtype=jnp.uint32) for odd in _ODD])


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the checksum of every array as sixteen hexadecimal digits, the same on every process.

    Each array is its own program, shared by arrays of one shape: one program for all compiles three times as long. They
    run one after another, since on fake devices, which share a pool of threads, several programs with collectives can
    starve each other.
    """
    pairs = {path: np.asarray(_compile(_mesh(array))(array)).tolist() for path, array in arrays.items()}
    return {path: "".join(f"{part:08x}" for part in pair) for path, pair in pairs.items()}


def _mesh(array: jax.Array) -> Mesh | None:
    mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@lru_cache(maxsize=4)
def _compile(mesh: Mesh | None) -> Any:
    # Replicated, or XLA may leave the sum on the devices of one process.
    return jax.jit(checksum, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    # Wider types become a last dimension of 32-bit words.
    return jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3: every bit of the input changes half of the bits of the output."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
