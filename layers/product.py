"""The product of activations and weights, in the compute dtype or in eight bits (Micikevicius et al. 2022, section 3).

In eight bits both factors are scaled by their current largest value ("current scaling") and rounded: to e4m3 in the
forward, the incoming gradient to e5m2 in the backward. Sums are in float32. The quantization is qwix's. Inside
`shard_map` each device scales its own blocks: no maximum is sent, and a mesh changes results by the rounding.
"""

from functools import partial
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
        y = _multiply_fp8(x if x.ndim == 3 else x.reshape(1, -1, num_features), kernel)
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
def _multiply_fp8(x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(x_BTD, kernel)[0]


def _forward(x_BTD: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    x, w = _quantize(x_BTD, _VALUE), _quantize(kernel, _VALUE)
    return _dot(x, w, ((2,), (0,)), x_BTD.dtype), (x, w)


def _backward(saved: tuple[Any, Any], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = _quantize(grad, _GRADIENT)
    features = tuple(range(2, grad.ndim))
    d_x = _dot(g, w, (features, tuple(range(1, grad.ndim - 1))), grad.dtype)
    d_kernel = _dot(x, g, ((0, 1), (0, 1)), grad.dtype)
    return d_x, sum_like(d_kernel, w.qvalue)


_multiply_fp8.defvjp(_forward, _backward)


def _quantize(array: jax.Array, qtype: str) -> Any:
    return _qwix().quantize(array, qtype, scale_dtype=jnp.float32)


def _dot(left: Any, right: Any, contracting: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> jax.Array:
    dot = partial(_qwix().dot_general, preferred_element_type=jnp.float32)
    return dot(left, right, (contracting, ((), ()))).astype(dtype)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ModelError(
            "model.matmuls='fp8' needs qwix, which is not installed.", fix="pip install 'trellax[quant]'."
        ) from None
    return qwix
