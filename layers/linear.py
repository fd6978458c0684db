"""The two halves of tensor parallelism: a linear layer split by columns, and one split by rows.

A column-parallel layer followed by a row-parallel one costs a single all-reduce (Shoeybi et al. 2019, section 3).
The layers name logical dimensions; `ShardingRules` says which mesh axis those live on. Read `mlp.py` next.
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
        ModelError: a dimension is no size, or `std` is no finite number.
    """
    for size in shape:
        check_count("shape", size, error=ModelError, least=0)
    check_number("std", std, error=ModelError)
    value = jax.random.normal(key, shape, jnp.float32) * std if std else jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, **param_metadata(dims, rules))


def mark_varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return x, the same on all devices of some manual axes, for work that differs between them.

    It costs nothing; its gradient is summed over the axes, one all-reduce, in float32: XLA's CPU backend aborts on
    bfloat16 sums over manual axes.
    """
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x.astype(jnp.float32), missing, to="varying").astype(x.dtype) if missing else x


@jax.custom_vjp
def hide_reduction(x_BTD: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x and a kernel split by columns as they are, with gradients that wait for each other.

    The gradient of x is all-reduced; the kernel's is a product that needs nothing of it. Where both are due at one
    moment, XLA runs that product between the halves of the all-reduce, as Megatron-LM's layers do by hand; left to
    itself it puts the product elsewhere, and the wait is seen.
    """
    return x_BTD, kernel


hide_reduction.defvjp(lambda *both: (both, None), lambda _, grads: jax.lax.optimization_barrier(grads))


class ColumnLinear(nnx.Module):
    """A linear layer whose output features are split over the axis of `dim`.

    x[B@data, T, D] @ kernel[D, F@tensor] + bias[F@tensor] -> y[B@data, T, F@tensor], or any leading dimensions, of
    which the first is the batch.

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

    Each device's part of the kernel is its parts of theirs, one after another. Made of their parameters, it has none of
    its own: where it is made in a loop, that copies kernels in every turn.

    Args:
        parts: number of devices that the first layer's features are split over.
        unit: features that stay together; a layer of fewer units than parts has each unit in several parts.
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
    """weight[..., F] -> [..., parts, F / parts], or a unit for each part where there are fewer units."""
    copies = max(1, parts * unit // weight.shape[-1])
    cut = weight.reshape(*weight.shape[:-1], parts // copies, 1, -1)
    repeated = jnp.broadcast_to(cut, (*cut.shape[:-2], copies, cut.shape[-1]))
    return repeated.reshape(*weight.shape[:-1], parts, -1)


class RowLinear(nnx.Module):
    """A linear layer whose input features are split over the axis of `dim`.

    x[B@data, T, F@tensor] @ kernel[F@tensor, D] + bias[D] -> y[B@data, T, D], or any leading dimensions, of which the
    first is the batch.

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
    """y[..., F] + bias[F], in the type of y; written so that strict rank promotion allows it."""
    return y + jnp.expand_dims(bias_F.astype(y.dtype), tuple(range(y.ndim - 1)))


def _dims_of(y: jax.Array, last: str) -> tuple[str | None, ...]:
    """The logical dimensions of y[B, ..., F]."""
    return (*("batch", *[None] * y.ndim)[: y.ndim - 1], last)
