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

from ..meshes.device_axes import mark_varying, num_blocks, varying_axes
from .check_inputs import check_features
from .collectives import own_columns, run_in_blocks
from .linear import ColumnLinear, add_bias, multiply_columns, name_dims
from .lora.nf4 import is_nf4, num_inputs
from .partitioning import param_metadata


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
        self.kernel, self.widths = self._join([(one.dim, one.kernel[...]) for one in linears], unit, "embed")
        scales = [(one.dim, one.kernel_scale[...]) for one in linears if one.kernel_scale is not None]
        # One scale a column, or one for every block of a column of four bits.
        lead = ("embed",) if is_nf4(first.kernel) else ()
        self.kernel_scale = self._join(scales, unit, *lead)[0] if scales else nnx.data(None)
        biases = [(one.dim, one.bias[...]) for one in linears if one.bias is not None]
        self.bias = self._join(biases, unit)[0] if biases else nnx.data(None)
        self._join_adapters(linears, unit)

    def __call__(self, x_BTD: jax.Array) -> list[jax.Array]:
        """x[B@data, T, D] -> y[B@data, T, F@tensor] of every layer."""
        check_features(x_BTD, num_inputs(self), layer="JoinedLinear")
        y_BTF = multiply_columns(self, x_BTD)
        if self.bias is not None:
            y_BTF = add_bias(y_BTF, self.bias[...])
        dims = name_dims(y_BTF, self.dim)
        cut = run_in_blocks(self._cut, rules=self.rules, in_dims=(dims,), out_dims=[dims] * len(self.widths))
        return cut(self.rules.constrain(y_BTF, dims))

    def _cut(self, y_BTF: jax.Array) -> list[jax.Array]:
        # Not `jnp.split`: its gradient is a concatenation, which XLA does not fuse with what makes the parts.
        return [y_BTF[..., end - width : end] for end, width in zip(accumulate(self.widths), self.widths, strict=True)]

    def _join(self, named: Sequence[tuple[str, jax.Array]], unit: int, *lead: str) -> tuple[nnx.Param, tuple[int, ...]]:
        """Join weights [*lead, F], each with the name of F, block by block; return the widths of a block's parts."""
        widths: list[int] = []

        def join(*weights: jax.Array) -> jax.Array:
            own = [self._own(dim, weight, unit) for (dim, _), weight in zip(named, weights, strict=True)]
            widths.extend(weight.shape[-1] for weight in own)
            return jnp.concatenate(own, axis=-1)

        for dim, weight in named:
            self.rules.check_in_context((*lead, dim), shape=weight.shape, name="a weight of JoinedLinear")
        joined, in_dims = (*lead, self.dim), tuple((*lead, dim) for dim, _ in named)
        value = run_in_blocks(join, rules=self.rules, in_dims=in_dims, out_dims=joined)(*(w for _, w in named))
        return nnx.Param(value, **param_metadata(joined, self.rules)), tuple(widths)

    def _join_adapters(self, linears: Sequence[ColumnLinear], unit: int) -> None:
        """Join adapters into one, [A1 A2] and the blocks B1, B2 on a diagonal: x A1 B1 and x A2 B2 side by side.

        A layer without one has columns of zeros.
        """
        self.lora, self.lora_a, self.lora_b = linears[0].lora, nnx.data(None), nnx.data(None)
        self.lora_m = nnx.data(None)
        adapted = [one for one in linears if one.lora_a is not None]
        if not adapted:
            return
        self.lora = adapted[0].lora
        whole = jnp.concatenate([one.lora_a[...] for one in adapted], axis=1)
        self.lora_a = nnx.Param(whole, **param_metadata(("embed", "lora"), self.rules))
        rows = whole.shape[1]
        named, first = [], 0
        for one in linears:
            own = _zeros_for(one, rows=0) if one.lora_b is None else one.lora_b[...]
            below = rows - first - own.shape[0]
            named.append((one.dim, jnp.pad(own, [(first, below), (0, 0)])))
            first += own.shape[0]
        self.lora_b, _ = self._join(named, unit, "lora")
        if adapted[0].lora_m is not None:
            # 0 leaves a column of a layer without an adapter as it is.
            lengths = [_zeros_for(one) if one.lora_m is None else one.lora_m[...] for one in linears]
            self.lora_m, _ = self._join([(one.dim, own) for one, own in zip(linears, lengths, strict=True)], unit)

    def _own(self, dim: str, weight: jax.Array, unit: int) -> jax.Array:
        # Where a layer's own features are not split, there are too few heads for that: see Attention.
        return weight if self.rules.axes(dim) else own_columns(weight, self.rules.axes(self.dim), unit=unit)


def _zeros_for(linear: ColumnLinear, *, rows: int | None = None) -> jax.Array:
    """Return zeros [F], or [rows, F], that vary over the axes over which the kernel of a layer varies."""
    kernel = linear.kernel[...]
    zeros = jnp.zeros(kernel.shape[1:] if rows is None else (rows, *kernel.shape[1:]), jnp.float32)
    return mark_varying(zeros, varying_axes(kernel)) if varying_axes(kernel) else zeros


def join_split(linears: Sequence[ColumnLinear], *, unit: int = 1) -> JoinedLinear | None:
    """Return layers of one input as a joined layer where their features are split, else None."""
    first = linears[0]
    return JoinedLinear(linears, unit=unit) if num_blocks(first.rules.axes(first.dim)) > 1 else None
