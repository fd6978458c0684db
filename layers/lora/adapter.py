"""Low-rank adapters: y = x W + (alpha / r) (x A) B with W frozen (Hu et al. 2021, section 4.1).

A is drawn and B is zero, so a model with fresh adapters is the model without. They are split as their kernel is, and
their products lie inside its region, so that an adapter sends no activation:

    split by columns    W[D, F@tensor]    A[D, r]           B[r, F@tensor]    (x A) on every device; dx is summed once
    split by rows       W[F@tensor, D]    A[F@tensor, r]    B[r, D]           x A B is a partial sum as x W is

What is whole over `tensor`, A of columns and B of rows, has its gradient summed over it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from ...meshes import ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying, num_blocks
from ..partitioning import make_param
from ..product import multiply
from .check_config import Lora

ADAPTED = "adapted"
"""Name of the sum of both products for rematerialization: by the policy for products each would be kept beside it."""


class _Adapted(Protocol):
    """What a layer with an adapter has."""

    lora: Lora | None
    lora_a: Any
    lora_b: Any
    dtype: DTypeLike


def make_adapter(
    rngs: nnx.Rngs, lora: Lora | None, shape: tuple[int, int], dims: tuple[str, str], rules: ShardingRules
) -> tuple[Any, Any]:
    """Return A [in, r] and B [r, out] of a kernel [in, out] whose dimensions have these names; None without one."""
    if lora is None or not lora.rank:
        return nnx.data(None), nnx.data(None)
    (d_in, d_out), rank = shape, lora.rank
    # x A has about the size of a feature of x.
    a = make_param(rngs.params(), (d_in, rank), (dims[0], "lora"), std=d_in**-0.5, rules=rules)
    return a, make_param(rngs.params(), (rank, d_out), ("lora", dims[1]), std=0.0, rules=rules)


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
