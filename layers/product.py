"""The product of activations and weights, in the compute dtype or in eight bits (Micikevicius et al. 2022, section 3).

In eight bits both factors are scaled by their current largest value ("current scaling") and rounded: to e4m3 in the
forward, the incoming gradient to e5m2 in the backward. Sums are in float32. The quantization is qwix's. Inside
`shard_map` each device scales its own blocks: no maximum is sent, and a mesh changes results by the rounding.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..meshes import ModelError
from ..meshes.device_axes import sum_like
from ..meshes.device_kind import is_nvidia

Matmuls = Literal["plain", "fp8"]
"""Precision of products with weights: the compute dtype ("plain"), or eight bits."""

_VALUE, _GRADIENT = "float8_e4m3fn", "float8_e5m2"


def multiply(
    x: jax.Array, kernel: jax.Array, *, dtype: DTypeLike, matmuls: Matmuls = "plain", scale: jax.Array | None = None
) -> jax.Array:
    """Return x[..., D] @ kernel[D, ...] -> y[..., ...] in `dtype`; times the scale [F] of a quantized kernel [D, F].

    With "fp8" the residual for the backward is x in eight bits, half the bytes of bfloat16.

    Raises:
        ModelError: "fp8" without the package qwix.
    """
    lead, (num_features, *features) = x.shape[:-1], kernel.shape
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if scale is not None:
        # Scaled before it is rounded. The kernel is widened while it is read, see `quantized.py`.
        y = _dot_rows(x.reshape(-1, num_features), kernel, jnp.float32) * scale[None]
        return y.astype(dtype).reshape(*lead, *features)
    if matmuls == "plain":
        # With tokens merged into one dim: where a weight gradient sums over two, XLA's CPU backend first transposes an
        # activation.
        y = _dot_rows(x.reshape(-1, num_features), kernel)
    else:
        y = _multiply_fp8(x.reshape(-1, num_features), kernel.reshape(num_features, -1))
    return y.reshape(*lead, *features)


def _dot_rows(x_nD: jax.Array, kernel: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Return x[n, D] @ kernel[D, ...] -> y[n, ...]; on GPUs a single row, as in decoding one sequence, is duplicated.

    XLA turns a product of one row into an elementwise multiplication and a sum, and writes the multiplication out: an
    array as large as the kernel. Two rows stay a matmul, which reads the kernel once.
    """
    is_duplicated = len(x_nD) == 1 and is_nvidia()
    # Without the barrier XLA would see that both rows are the same.
    rows_nD = jax.lax.optimization_barrier(jnp.concatenate([x_nD, x_nD])) if is_duplicated else x_nD
    y = jax.lax.dot_general(rows_nD, kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
    return y[:1] if is_duplicated else y


@jax.custom_vjp
def _multiply_fp8(x_nD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return _forward(x_nD, kernel_DF)[0]


def _forward(x_nD: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, Any]:
    x, w = _quantize(x_nD, _VALUE), _quantize(kernel_DF, _VALUE)
    return _dot(x, w, (1, 0), x_nD.dtype), (x, w)


def _backward(saved: tuple[Any, Any], grad_nF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = _quantize(grad_nF, _GRADIENT)
    return _dot(g, w, (1, 1), grad_nF.dtype), sum_like(_dot(x, g, (0, 0), grad_nF.dtype), w.qvalue)


_multiply_fp8.defvjp(_forward, _backward)


def _quantize(array: jax.Array, qtype: str) -> Any:
    # The scale is computed in the array's dtype, so it is exact in either.
    return _qwix().quantize(array, qtype, scale_dtype=jnp.float32)


def _dot(left: Any, right: Any, over: tuple[int, int], dtype: Any) -> jax.Array:
    """Return the product of two quantized matrices over a dim of each, in a dtype; sums are in float32."""
    dims = (((over[0],), (over[1],)), ((), ()))
    if is_nvidia():
        # XLA makes of this the product in eight bits with both scales inside, and cuBLASLt writes its result in the
        # dtype. That of the values alone would be written in float32, for another kernel to read and scale.
        a, b = (one.qvalue.astype(dtype) * one.scale.reshape(()).astype(dtype) for one in (left, right))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
    return _qwix().dot_general(left, right, dims, preferred_element_type=jnp.float32).astype(dtype)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ModelError(
            "model.matmuls='fp8' needs qwix, which is not installed.", fix="pip install 'trellax[quant]'."
        ) from None
    return qwix
