"""Frozen kernels in four bits: NormalFloat numbers, a scale for each block of 64 (Dettmers et al. 2023, section 3).

A number is one of 16, the quantiles of a normal distribution (appendix E), times the largest of its block:

    block of the kernel     0.40  -0.10   0.00   0.05        scale 0.40
    over the scale          1.00  -0.25   0.00   0.13
    nearest code              15      4      7      8        1.00  -0.284  0.0  0.0796
    as it is used           0.40  -0.114  0.00   0.032

Blocks lie along the features of x, which no rule splits, so values and scales are the same on every mesh:

    split by columns    kernel[D, F@tensor]    values uint8[D/2, F@tensor]    scale[D/64, F@tensor]
    split by rows       kernel[F@tensor, D]    values uint8[F@tensor, D/2]    scale[F@tensor, D/64]

Two codes are a byte, of places i and i + D/2. A layer makes its numbers where it uses them, forward and backward: they
depend on parameters alone, and such values no pipeline keeps (`../../pipeline/executor/backward/residuals.py`).

qwix has the same codes as uint4, a type that numpy does not know as one of integers: stages could not be padded, and
every count of bytes would take a number for a byte. So the codes are packed here; a test compares them with qwix's.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .frozen_kernels import block_size

_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def is_nf4(kernel: Any) -> bool:
    """Return whether a kernel, an array or a shape, holds codes of four bits."""
    return kernel.dtype == jnp.uint8


def quantize_nf4(kernel: jax.Array, *, dim: int) -> tuple[jax.Array, jax.Array]:
    """Return values, uint8, and float32 scales of a kernel[..., in, out] with blocks along a dimension, -2 or -1."""
    kernel, block = kernel.astype(jnp.float32), block_size(kernel.shape[dim])
    blocks = _in_blocks(kernel, dim, block)
    top = jnp.abs(blocks).max(dim, keepdims=True)
    # A block of zeros has any scale. One with a NaN, which XLA's maximum may pass over, gives NaN.
    scale = jnp.where(jnp.isfinite(blocks).all(dim, keepdims=True), jnp.where(top == 0, 1.0, top), jnp.nan)
    share = (blocks / scale).reshape(kernel.shape)
    halfway = [(low + high) / 2 for low, high in pairwise(_CODES)]
    code = sum(((share > middle).astype(jnp.uint8) for middle in halfway), start=jnp.zeros(kernel.shape, jnp.uint8))
    low, high = jnp.split(code, 2, axis=dim)
    return low | (high << 4), jnp.squeeze(scale, dim)


def dequantize_nf4(values: jax.Array, scale: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Return the kernel[..., in, out] of values and scales, in `dtype`."""
    dim = block_dim(values, scale)
    code = jnp.concatenate([values & 15, values >> 4], axis=dim)
    numbers = jnp.take(jnp.asarray(_CODES, jnp.float32), code.astype(jnp.int32), axis=0)
    block = code.shape[dim] // scale.shape[dim]
    whole = _in_blocks(numbers, dim, block) * jnp.expand_dims(scale, dim)
    return whole.reshape(code.shape).astype(dtype)


def round_nf4(kernel: jax.Array, *, dim: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Return a kernel with the numbers that four bits leave of it, in `dtype`."""
    return dequantize_nf4(*quantize_nf4(kernel, dim=dim), dtype)


def whole_shape(values: Any, scale: Any) -> tuple[int, ...]:
    """Return the shape of the kernel of values and scales, arrays or shapes."""
    shape, dim = [*values.shape], block_dim(values, scale)
    shape[dim] *= 2
    return tuple(shape)


def block_dim(values: Any, scale: Any) -> int:
    """Return the dimension of blocks, -2 or -1: along the other one, values and scales are as long."""
    return -2 if values.shape[-1] == scale.shape[-1] else -1


def num_inputs(layer: Any) -> int:
    """Return the features that a layer's kernel multiplies."""
    kernel = layer.kernel[...]
    return whole_shape(kernel, layer.kernel_scale[...])[-2] if is_nf4(kernel) else kernel.shape[-2]


def hold_nf4(layer: Any) -> None:
    """Replace the kernel of a linear layer by values and scales, in place; its blocks lie along "embed".

    Kernels of experts are [E, in, out].
    """
    metadata = dict(layer.kernel.get_metadata())
    values, scale = quantize_nf4(layer.kernel[...], dim=_blocked_dim(metadata["out_sharding"]))
    layer.kernel, layer.kernel_scale = nnx.Param(values, **metadata), nnx.Param(scale, **metadata)


def _blocked_dim(dims: tuple[str, ...]) -> int:
    return -2 if dims[-2] == "embed" else -1


def _in_blocks(x: jax.Array, dim: int, block: int) -> jax.Array:
    """Return x with blocks along a dimension, counted from the end, as a dimension of their own in its place.

    x[..., D, F] -> [..., D/64, 64, F] for -2; x[..., F, D] -> [..., F, D/64, 64] for -1
    """
    place = x.ndim + dim
    return x.reshape(*x.shape[:place], -1, block, *x.shape[place + 1 :])
