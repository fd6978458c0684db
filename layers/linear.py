"""The two halves of tensor parallelism: a linear layer split by columns, and one split by rows.

A column-parallel layer followed by a row-parallel one costs a single all-reduce (Shoeybi et al. 2019, section 3):

                  A[D, F@tensor]           B[F@tensor, D]
                 +------+               +------+
    rank 0   x @ |  A0  |  -> h0 gelu ->|  B0  | -> y0 --+
                 +------+               +------+         +-- all-reduce: y = y0 + y1, on both ranks
    rank 1   x @ |  A1  |  -> h1 gelu ->|  B1  | -> y1 --+
                 +------+               +------+
             x is whole    h is split   each y is a partial sum of x's shape

Columns first, since gelu(h0) and gelu(h1) are parts of gelu(h), while gelu(y0) + gelu(y1) is not gelu(y). The backward
is the mirror image: dh is computed without sending, dx is a partial sum, one all-reduce.

The layers name logical dimensions; `ShardingRules` says which mesh axis those are split over. Read `mlp.py` next.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice, check_count, check_number
from .check_inputs import check_features
from .partitioning import param_metadata
from .product import Matmuls, multiply

INIT_STD = 0.02


def make_param(
    key: jax.Array, shape: tuple[int, ...], dims: tuple[str, ...], *, std: float, rules: ShardingRules = DEFAULT_RULES
) -> nnx.Param:
    """Return a float32 parameter drawn from a normal distribution, annotated with its logical dimensions.

    `std` 0 gives zeros. The values do not depend on the mesh.

    Raises:
        ModelError: a dimension is negative or not a whole number, or `std` is not a finite number of 0 or more.
    """
    for size in shape:
        check_count("shape", size, error=ModelError, least=0)
    check_number("std", std, error=ModelError)
    value = jax.random.normal(key, shape, jnp.float32) * std if std else jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, **param_metadata(dims, rules))


def mark_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return x with its type marked as varying over manual axes on which its value is still the same.

    The forward costs nothing. The gradient is summed over the axes, one all-reduce, in float32: XLA's CPU backend
    aborts on bfloat16 sums over manual axes.
    """
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x.astype(jnp.float32), missing, to="varying").astype(x.dtype) if missing else x


@jax.custom_vjp
def hide_reduction(x_BTD: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x and a column-split kernel unchanged, and tie their gradients so that XLA overlaps them.

    The gradient of x is all-reduced; that of the kernel is a product that does not depend on the all-reduce. With a
    barrier on both, XLA schedules the product between the start and the end of the all-reduce, as Megatron-LM's layers
    do by hand. Without it, the product is scheduled elsewhere and the all-reduce is exposed.
    """
    return x_BTD, kernel


hide_reduction.defvjp(lambda *both: (both, None), lambda _, grads: jax.lax.optimization_barrier(grads))


class ColumnLinear(nnx.Module):
    """A linear layer whose output features are split over the axis of `dim`.

    x[B@data, T, D] @ kernel[D, F@tensor] + bias[F@tensor] -> y[B@data, T, F@tensor]; any leading dimensions will do,
    the first is the batch.

    Forward: no communication. Backward: one all-reduce of dx over `tensor`.

    >>> up = ColumnLinear(128, 512, dim="ffn", rngs=nnx.Rngs(0))
    >>> up(jnp.ones((2, 16, 128))).shape
    (2, 16, 512)

    Args:
        dim: logical name of the output features ("ffn", "heads", "kv_heads").
        dtype: compute dtype; parameters stay float32.
        matmuls: what the product is computed in, see `product.py`.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        dim: str,
        rngs: nnx.Rngs,
        bias: Literal["on", "off"] = "on",
        std: float = INIT_STD,
        dtype: DTypeLike = jnp.float32,
        matmuls: Matmuls = "plain",
        rules: ShardingRules = DEFAULT_RULES,
    ) -> None:
        check_count("in_size", in_size, error=ModelError)
        check_count("out_size", out_size, error=ModelError)
        check_choice("bias", bias, ("on", "off"), error=ModelError)
        check_choice("matmuls", matmuls, get_args(Matmuls), error=ModelError)
        self.dim, self.dtype, self.matmuls, self.rules = dim, dtype, matmuls, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), ("embed", dim), std=std, rules=rules)
        self.bias = nnx.data(None)
        if bias == "on":
            self.bias = make_param(rngs.params(), (out_size,), (dim,), std=0.0, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, F@tensor].

        Raises:
            ModelError: x has another number of features.
            ShardingError: F does not split over the axis of `dim`, or B over `data`.
        """
        check_features(x_BTD, self.kernel.shape[0], layer="ColumnLinear")
        kernel = self.kernel[...].astype(self.dtype)
        if self.rules.parts_in_context(self.dim) > 1:
            x_BTD, kernel = hide_reduction(x_BTD, kernel)
        y_BTF = multiply(x_BTD, kernel, dtype=self.dtype, matmuls=self.matmuls)
        if self.bias is not None:
            y_BTF = _add_bias(y_BTF, self.bias[...])
        return self.rules.constrain(y_BTF, _dims_of(y_BTF, self.dim))


class JoinedLinear(nnx.Module):
    """Column-parallel layers of one input as a single product, so that the backward all-reduces dx once.

    x[B@data, T, D] @ kernel[D, F@tensor] -> y[B@data, T, F@tensor] of every layer, in order

    Each device's columns are its columns of every layer, side by side. With gate and up on two `tensor` ranks:

        gate = [g0 | g1]   up = [u0 | u1]   joined = [g0 u0 | g1 u1]

    The kernel is made from the layers' own: made inside a loop, it is copied in every iteration.

    Args:
        parts: number of devices that the first layer's features are split over.
        unit: features that stay together, a head; a layer with fewer units than parts has each unit on several devices.
    """

    def __init__(self, linears: Sequence[ColumnLinear], *, parts: int, unit: int = 1) -> None:
        first = linears[0]
        self.dim, self.dtype, self.matmuls, self.rules = first.dim, first.dtype, first.matmuls, first.rules
        kernels = [_cut_columns(linear.kernel[...], parts, unit) for linear in linears]
        biases = [_cut_columns(linear.bias[...], parts, unit) for linear in linears if linear.bias is not None]
        self.parts, self.widths = parts, tuple(kernel.shape[-1] for kernel in kernels)
        self.kernel = self._join(kernels, ("embed", self.dim))
        self.bias = self._join(biases, (self.dim,)) if biases else nnx.data(None)

    def __call__(self, x_BTD: jax.Array) -> list[jax.Array]:
        """x[B@data, T, D] -> y[B@data, T, F@tensor] of every layer."""
        check_features(x_BTD, self.kernel.shape[0], layer="JoinedLinear")
        x_BTD, kernel = hide_reduction(x_BTD, self.kernel[...].astype(self.dtype))
        y_BTF = multiply(x_BTD, kernel, dtype=self.dtype, matmuls=self.matmuls)
        if self.bias is not None:
            y_BTF = _add_bias(y_BTF, self.bias[...])
        dims, lead = _dims_of(y_BTF, self.dim), x_BTD.shape[:-1]
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


class RowLinear(nnx.Module):
    """A linear layer whose input features are split over the axis of `dim`.

    x[B@data, T, F@tensor] @ kernel[F@tensor, D] + bias[D] -> y[B@data, T, D]; any leading dimensions will do, the first
    is the batch.

    Each device holds a partial sum, so forward costs one all-reduce of y over `tensor`; backward costs nothing.
    Where the axis is manual (inside `shard_map`, for inference), x is this device's block of it.

    >>> down = RowLinear(512, 128, dim="ffn", rngs=nnx.Rngs(0))
    >>> down(jnp.ones((2, 16, 512))).shape
    (2, 16, 128)

    Args:
        dim: logical name of the input features ("ffn", "heads").
        dtype: compute dtype; parameters stay float32.
        matmuls: what the product is computed in, see `product.py`.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        dim: str,
        rngs: nnx.Rngs,
        bias: Literal["on", "off"] = "on",
        std: float = INIT_STD,
        dtype: DTypeLike = jnp.float32,
        matmuls: Matmuls = "plain",
        rules: ShardingRules = DEFAULT_RULES,
    ) -> None:
        check_count("in_size", in_size, error=ModelError)
        check_count("out_size", out_size, error=ModelError)
        check_choice("bias", bias, ("on", "off"), error=ModelError)
        check_choice("matmuls", matmuls, get_args(Matmuls), error=ModelError)
        self.dim, self.dtype, self.matmuls, self.rules = dim, dtype, matmuls, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), (dim, "embed"), std=std, rules=rules)
        self.bias = nnx.data(None)
        if bias == "on":
            self.bias = make_param(rngs.params(), (out_size,), ("embed",), std=0.0, rules=rules)

    def __call__(self, x_BTF: jax.Array) -> jax.Array:
        """x[B@data, T, F@tensor] -> y[B@data, T, D].

        Raises:
            ModelError: x has another number of features.
            ShardingError: F does not split over the axis of `dim`, or B over `data`.
        """
        check_features(x_BTF, self.kernel.shape[0], layer="RowLinear")
        self.rules.check_in_context((self.dim, "embed"), shape=self.kernel.shape, name="the kernel of RowLinear")
        y_BTD = multiply(x_BTF, self.kernel[...], dtype=self.dtype, matmuls=self.matmuls)
        axes = self.rules.manual_axes(self.dim)
        y_BTD = jax.lax.psum(y_BTD, axes) if axes else self.rules.constrain(y_BTD, _dims_of(y_BTD, "embed"))
        # After the all-reduce: added before it, the bias would be counted once per tensor rank.
        return y_BTD if self.bias is None else _add_bias(y_BTD, self.bias[...])


def _add_bias(y: jax.Array, bias_F: jax.Array) -> jax.Array:
    """Return y[..., F] + bias[F] in the dtype of y, with explicit dimensions, as strict rank promotion demands."""
    return y + jnp.expand_dims(bias_F.astype(y.dtype), tuple(range(y.ndim - 1)))


def _dims_of(y: jax.Array, last: str) -> tuple[str | None, ...]:
    """Return the logical dimensions of y[B, ..., F], the last of which is named `last`."""
    return (*("batch", *[None] * y.ndim)[: y.ndim - 1], last)
