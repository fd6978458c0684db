"""Low-rank adapters: y = x W + (alpha / r) (x A) B with W frozen (Hu et al. 2021, section 4.1).

A is drawn and B is zero, so a model with fresh adapters is the model without. They are split as their kernel is, and
their products lie inside its region, so that an adapter sends no activation:

    split by columns    W[D, F@tensor]    A[D, r]           B[r, F@tensor]    (x A) on every device; dx is summed once
    split by rows       W[F@tensor, D]    A[F@tensor, r]    B[r, D]           x A B is a partial sum as x W is

What is whole over `tensor`, A of columns and B of rows, has its gradient summed over it.

With magnitudes m (DoRA, Liu et al. 2024, equation 5) columns have the direction of V = W + (alpha / r) A B, and m for
their length: y = x V * m / |V|, where |V|, the length of each column, is a constant to the gradient (section 4.3). V is
not made, since |V|^2 = |W|^2 + 2 s (A^T W) * B + s^2 B * (A^T A B), summed over features in; where rows are split that
is one all-reduce of a number a column. Fresh magnitudes are |W|, with which the model is the model without.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ...meshes import ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying, num_blocks
from ..collectives import sum_blocks
from ..partitioning import make_param, param_metadata
from ..product import multiply
from ..quantized import dequantize, scale_of
from .check_config import Lora
from .nf4 import dequantize_nf4, is_nf4

ADAPTED = "adapted"
"""Name of the sum of both products for rematerialization: by the policy for products each would be kept beside it."""


class _Adapted(Protocol):
    """What a layer with an adapter has."""

    lora: Lora | None
    lora_a: Any
    lora_b: Any
    lora_m: Any
    kernel: nnx.Param
    dtype: DTypeLike


def make_adapter(
    rngs: nnx.Rngs, lora: Lora | None, kernel: jax.Array, dims: tuple[str, ...], rules: ShardingRules
) -> tuple[Any, Any, Any]:
    """Return A [..., in, r], B [..., r, out] and magnitudes [..., out] of a kernel [..., in, out], [E, in, out] say.

    None for each that the layer has not.

    Args:
        dims: names of the kernel's dimensions.
    """
    if lora is None or not lora.rank:
        return nnx.data(None), nnx.data(None), nnx.data(None)
    (*lead, d_in, d_out), (*first, row, column), rank = kernel.shape, dims, lora.rank
    # x A has about the size of a feature of x.
    a = make_param(rngs.params(), (*lead, d_in, rank), (*first, row, "lora"), std=d_in**-0.5, rules=rules)
    b = make_param(rngs.params(), (*lead, rank, d_out), (*first, "lora", column), std=0.0, rules=rules)
    if lora.magnitude == "off":
        return a, b, nnx.data(None)
    return a, b, nnx.Param(column_lengths(kernel), **param_metadata((*first, column), rules))


def column_lengths(kernel: jax.Array) -> jax.Array:
    """Return the length of every column: kernel[..., in, out] -> [..., out], float32."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(-2))


def enter_frozen(x: jax.Array, kernel: jax.Array, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Enter a split region as `enter_split` does, with a kernel that has no gradient for the sum of dx to run beside.

    x[..., D], kernel[D, F@axes] -> x[..., D]{V:axes}, kernel. Free; its transpose is one all-reduce of dx.
    """
    kernel = jax.lax.stop_gradient(kernel)
    return (mark_varying(x, manual_axes(axes)) if num_blocks(axes) > 1 else x), kernel


def add_adapter(layer: _Adapted, x: jax.Array, y: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return y + scale (x A) B, of a layer whose kernel is split over axes; y where it has no adapter.

    x[..., D] or [..., F@axes], y[..., F@axes] or a partial sum [..., D]
    """
    if layer.lora is None or layer.lora_a is None:
        return y
    # Marked, so that the gradient of what is whole is summed where it is made, and not that of a small activation.
    a, b = (mark_varying(w[...], manual_axes(axes)) for w in (layer.lora_a, layer.lora_b))
    small = multiply(x, a, dtype=layer.dtype) * layer.lora.scale
    return checkpoint_name(y + multiply(small, b, dtype=layer.dtype), ADAPTED)


def scale_columns(layer: _Adapted, y: jax.Array, *, rows: Sequence[str] = ()) -> jax.Array:
    """Return y[..., F] with columns of the lengths that a layer's magnitudes say; y where it has none.

    Args:
        rows: the axes that split the kernel's features in. y is summed over them already, so that it is the sum that is
            kept for the gradient of m, and not each device's part.
    """
    if layer.lora_m is None:
        return y
    factor = jnp.expand_dims(_relative_lengths(layer, layer.lora_m[...], rows), tuple(range(y.ndim - 1)))
    return (y.astype(jnp.float32) * factor).astype(y.dtype)


def _relative_lengths(layer: _Adapted, magnitude_F: jax.Array, rows: Sequence[str]) -> jax.Array:
    assert layer.lora is not None
    kernel, a, b = (w[...] for w in (layer.kernel, layer.lora_a, layer.lora_b))
    return relative_lengths(kernel, a, b, magnitude_F, scale=layer.lora.scale, rows=rows)


def relative_lengths(
    kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, *, scale: float, rows: Sequence[str]
) -> jax.Array:
    """Return m / |V| [..., F] in float32; 1 where m is 0, as of layers without an adapter that are joined with others.

    kernel[..., D@rows, F], A[..., D@rows, r], B[..., r, F], m[..., F]; of these m alone has a gradient.
    """
    kernel, a, b = map(jax.lax.stop_gradient, (kernel, a, b))
    # A in the kernel's dtype, in which x A is computed: in float32 the product would read a copy of the kernel.
    exact: dict[str, Any] = {"precision": "highest", "preferred_element_type": jnp.float32}
    inner_rF = jnp.einsum("...dr,...df->...rf", a.astype(kernel.dtype), kernel, **exact)
    square_rr = jnp.einsum("...dr,...ds->...rs", a, a, **exact)
    outer_rF = jnp.einsum("...rs,...sf->...rf", square_rr, b.astype(jnp.float32), **exact)
    added_F = (b.astype(jnp.float32) * (2 * scale * inner_rF + scale**2 * outer_rF)).sum(-2)
    squares_F = jnp.square(kernel.astype(jnp.float32)).sum(-2) + added_F
    lengths_F = jnp.sqrt(sum_blocks(squares_F, rows))
    is_own_F = magnitude != 0
    return jnp.where(is_own_F, magnitude / jnp.where(is_own_F, lengths_F, 1.0), 1.0)


def whole_kernel(layer: Any) -> jax.Array:
    """Return the float32 kernel[..., in, out] by which a layer multiplies, its adapter merged; rows are not split.

    For whoever multiplies by a kernel in another way than the layer does.
    """
    kernel, scale = layer.kernel[...], scale_of(layer)
    has_codes = scale is not None and is_nf4(kernel)
    kernel = dequantize_nf4(kernel, scale) if has_codes else dequantize(kernel, scale)
    if layer.lora_a is None:
        return kernel
    product = jnp.einsum("...dr,...rf->...df", layer.lora_a[...], layer.lora_b[...], precision="highest")
    return merged(kernel, layer.lora.scale * product, None if layer.lora_m is None else layer.lora_m[...])


def merged(kernel: jax.Array, added: jax.Array, magnitude: jax.Array | None) -> jax.Array:
    """Return kernel[..., in, out] + added in float32; columns have the lengths m[..., out] if there are magnitudes."""
    whole = kernel.astype(jnp.float32) + added
    return whole if magnitude is None else whole * (magnitude / column_lengths(whole))[..., None, :]
