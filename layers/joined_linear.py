"""Join column-parallel layers that read the same input into one product.

Queries, keys and values read one x, and so do gate and up. As separate layers each would all-reduce its own dx in the
backward; as one product they all-reduce the sum, once. With gate and up on two `tensor` ranks:

    gate = [g0 | g1]   up = [u0 | u1]   joined = [g0 u0 | g1 u1]        rank 0: x @ [g0 u0]    rank 1: x @ [g1 u1]

Side by side per rank, not [gate | up]: cutting that product into gate and up would move columns between ranks. Inside
`shard_map` each rank joins its own blocks, [g0 u0], and that is all.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx

from .check_inputs import check_features
from .collectives import enter_split, num_auto_blocks, own_columns
from .linear import ColumnLinear, add_bias, name_dims
from .partitioning import param_metadata
from .product import multiply


class JoinedLinear(nnx.Module):
    """Column-parallel layers of one input as a single product, so that the backward all-reduces dx once.

    x[B@data, T, D] @ kernel[D, F@tensor] -> y[B@data, T, F@tensor] of every layer, in order

    Forward: no communication. Backward: one all-reduce of dx over `tensor`. The kernel is a copy of the layers' own:
    built inside a loop, it is copied in every iteration.

    Args:
        unit: features that stay together, a head; a layer with fewer units than devices has each unit on several.
    """

    def __init__(self, linears: Sequence[ColumnLinear], *, unit: int = 1) -> None:
        first = linears[0]
        self.dim, self.dtype, self.matmuls, self.rules = first.dim, first.dtype, first.matmuls, first.rules
        axes = self.rules.axes(self.dim)
        self.parts = num_auto_blocks(axes)

        def cut(linear: ColumnLinear, weight: jax.Array) -> jax.Array:
            # Where the layer's own features are not split, there are too few heads for that: see Attention.
            own = weight if self.rules.axes(linear.dim) else own_columns(weight, axes, unit=unit)
            return _cut_columns(own, self.parts, unit)

        kernels = [cut(linear, linear.kernel[...]) for linear in linears]
        biases = [cut(linear, linear.bias[...]) for linear in linears if linear.bias is not None]
        self.widths = tuple(kernel.shape[-1] for kernel in kernels)
        self.kernel = self._join(kernels, ("embed", self.dim))
        self.bias = self._join(biases, (self.dim,)) if biases else nnx.data(None)

    def __call__(self, x_BTD: jax.Array) -> list[jax.Array]:
        """x[B@data, T, D] -> y[B@data, T, F@tensor] of every layer."""
        check_features(x_BTD, self.kernel.shape[0], layer="JoinedLinear")
        x_BTD, kernel = enter_split(x_BTD, self.kernel[...].astype(self.dtype), self.rules.axes(self.dim))
        y_BTF = multiply(x_BTD, kernel, dtype=self.dtype, matmuls=self.matmuls)
        if self.bias is not None:
            y_BTF = add_bias(y_BTF, self.bias[...])
        dims, lead = name_dims(y_BTF, self.dim), x_BTD.shape[:-1]
        y_BTF = self.rules.constrain(y_BTF, dims)
        y_BTPW, ends = y_BTF.reshape(*lead, self.parts, -1), list(accumulate(self.widths))
        # Not `jnp.split`: its gradient is a concatenation, which XLA does not fuse with what makes the parts.
        pieces = [y_BTPW[..., end - width : end] for width, end in zip(self.widths, ends, strict=True)]
        return [self.rules.constrain(y.reshape(*lead, -1), dims) for y in pieces]

    def _join(self, pieces: list[jax.Array], dims: tuple[str, ...]) -> nnx.Param:
        joined = jnp.concatenate(pieces, axis=-1)
        value = self.rules.constrain(joined.reshape(*joined.shape[:-2], -1), dims)
        return nnx.Param(value, **param_metadata(dims, self.rules))


def _cut_columns(weight: jax.Array, parts: int, unit: int) -> jax.Array:
    """Cut columns into parts, weight[..., F] -> [..., parts, F / parts]; with fewer units than parts, repeat units."""
    copies = max(1, parts * unit // weight.shape[-1])
    cut = weight.reshape(*weight.shape[:-1], parts // copies, 1, -1)
    repeated = jnp.broadcast_to(cut, (*cut.shape[:-2], copies, cut.shape[-1]))
    return repeated.reshape(*weight.shape[:-1], parts, -1)
