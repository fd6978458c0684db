"""Weights in eight bits with one scale for each output channel: what a server reads is half of bfloat16.

    kernel[D, F] = values[D, F] x scale[F], rounded        values int8 (-127 to 127) or fp8 (e4m3, up to 448)
    x @ kernel   = (x @ values) x scale                    the product reads bytes, the scale is one number a column

Nothing is calibrated: a scale is the largest weight of its column (Dettmers et al. 2022, "LLM.int8()", section 2.1,
for columns of weights; activations stay as they are). It does not depend on the mesh, so a sharded model has the same
values and scales as a whole one. Embedding, head, norms, biases and routers stay as they are.
"""

from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ..meshes import ModelError
from ..meshes.arguments import check_choice

Weights = Literal["plain", "int8", "fp8"]
"""How weights of linear layers are held for inference: in the compute dtype ("plain"), or in eight bits."""

ModuleT = TypeVar("ModuleT", bound=nnx.Module)

_FORMATS: dict[str, tuple[Any, float]] = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}

SCALE = "kernel_scale"
"""The name of a scale among the parameters of a layer, beside "kernel"."""


def quantize(kernel: jax.Array, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Return values and scale of a kernel: [..., D, F] -> [..., D, F] in eight bits, and float32 [..., F]."""
    dtype, most = _FORMATS[weights]
    kernel = kernel.astype(jnp.float32)
    top = jnp.abs(kernel).max(-2, keepdims=True)
    # A column of zeros has any scale. One with a NaN, which XLA's maximum may pass over, gives NaN.
    scale = jnp.where(jnp.isfinite(kernel).all(-2, keepdims=True), jnp.where(top == 0, 1.0, top / most), jnp.nan)
    values = kernel / scale
    values = jnp.round(values) if weights == "int8" else values
    return values.astype(dtype), scale[..., 0, :]


def dequantize(values: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Return float32 weights [..., D, F]; those without a scale as they are."""
    return values if scale is None else values.astype(jnp.float32) * scale[..., None, :]


def quantize_layers(module: ModuleT, weights: Weights) -> ModuleT:
    """Return a module whose linear layers hold values and scales, changed in place; "plain" changes nothing.

    Layers are those with a `kernel_scale`, None until then. Kernels may be stacked, [L, D, F].

    Raises:
        ModelError: there is no such format.
    """
    check_choice("weights", weights, get_args(Weights), error=ModelError)
    if weights != "plain":
        for _, layer in nnx.iter_modules(module):
            if hasattr(layer, SCALE):
                _quantize_layer(layer, weights)
    return module


def scale_of(layer: Any) -> jax.Array | None:
    """Return the scale [F] of a layer, None of one that is not quantized."""
    return None if layer.kernel_scale is None else layer.kernel_scale[...]


def _quantize_layer(layer: Any, weights: Weights) -> None:
    metadata = dict(layer.kernel.get_metadata())
    dims = metadata["out_sharding"]
    values, scale = quantize(layer.kernel[...], weights)
    layer.kernel = nnx.Param(values, **metadata)
    layer.kernel_scale = nnx.Param(scale, **metadata | {"out_sharding": (*dims[:-2], dims[-1])})
