"""A checksum of an array that does not depend on how it is split over devices: integers, added in any order.

It is taken on the devices before a save and after a restore, so what comes back is known to be what was there, whatever
happened in between. It costs one pass over the array.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_ODD = (0x9E3779B1, 0x85EBCA77)


def checksum(array: jax.Array) -> jax.Array:
    """Return a checksum as uint32[2]: the sum, modulo 2^32, of a hash of every element's bits and place.

    Two sums with different hashes miss one in 2^64 random changes. A swap of two elements changes them too.
    """
    bits = _bits(array)
    place = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * np.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    return jnp.stack([jnp.sum(_mix(bits ^ (place * np.uint32(odd) + np.uint32(1))), dtype=jnp.uint32) for odd in _ODD])


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the checksum of every array as sixteen hexadecimal digits, the same on every process.

    Arrays of one shape share a program, which compiles in a third of the time that one program of all takes. Each is
    waited for: fake devices share a pool of threads, in which programs that meet in sums can starve each other.
    """
    pairs = {path: np.asarray(_compile(_mesh(array))(array)).tolist() for path, array in arrays.items()}
    return {path: "".join(f"{part:08x}" for part in pair) for path, pair in pairs.items()}


def _mesh(array: jax.Array) -> Mesh | None:
    mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@lru_cache(maxsize=4)
def _compile(mesh: Mesh | None) -> Any:
    # Left to XLA a sum over all processes may end on one of them.
    return jax.jit(checksum, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    # Wider types become a last dimension of 32-bit words.
    return jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of the input changes half of the output."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
