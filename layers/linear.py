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

Where the rules split `stream_tokens`, x and y have the tokens of one device: an all-gather before A and a
reduce-scatter after B take the place of the all-reduces, in as many bytes (Korthikanti et al. 2022, section 4.2.2).

The layers name logical dimensions; `ShardingRules` says which mesh axis those are split over. Read `mlp.py` next.
"""

from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice, check_count
from ..meshes.device_axes import num_blocks
from .check_inputs import check_features
from .collectives import enter_gathered, enter_split, gather_tokens, leave_split
from .lora.adapter import add_adapter, enter_frozen, make_adapter, scale_columns
from .lora.check_config import Lora
from .lora.nf4 import dequantize_nf4, hold_nf4, is_nf4, num_inputs
from .partitioning import INIT_STD, make_param
from .product import Matmuls, multiply
from .quantized import scale_of


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
        lora: its adapter, if the kernel is frozen, see `lora/adapter.py`.
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
        lora: Lora | None = None,
        rules: ShardingRules = DEFAULT_RULES,
    ) -> None:
        _check_options(in_size, out_size, bias, matmuls)
        self.dim, self.dtype, self.matmuls, self.rules = dim, dtype, matmuls, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), ("embed", dim), std=std, rules=rules)
        self.bias = nnx.data(None)
        if bias == "on":
            self.bias = make_param(rngs.params(), (out_size,), (dim,), std=0.0, rules=rules)
        self.kernel_scale = nnx.data(None)
        adapter = make_adapter(rngs, lora, self.kernel[...], ("embed", dim), rules)
        self.lora, (self.lora_a, self.lora_b, self.lora_m) = lora, adapter
        if lora is not None and lora.base == "nf4":
            hold_nf4(self)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, F@tensor].

        Raises:
            ModelError: x has another number of features.
            ShardingError: F does not split over the axis of `dim`, or B over `data`.
        """
        check_features(x_BTD, num_inputs(self), layer="ColumnLinear")
        y_BTF = multiply_columns(self, x_BTD)
        if self.bias is not None:
            y_BTF = add_bias(y_BTF, self.bias[...])
        return self.rules.constrain(y_BTF, name_dims(y_BTF, self.dim))


class RowLinear(nnx.Module):
    """A linear layer whose input features are split over the axis of `dim`.

    x[B@data, T, F@tensor] @ kernel[F@tensor, D] + bias[D] -> y[B@data, T, D]; any leading dimensions will do, the first
    is the batch.

    Each device holds a partial sum, so forward costs one all-reduce of y over `tensor`; backward costs nothing.

    >>> down = RowLinear(512, 128, dim="ffn", rngs=nnx.Rngs(0))
    >>> down(jnp.ones((2, 16, 512))).shape
    (2, 16, 128)

    Args:
        dim: logical name of the input features ("ffn", "heads").
        dtype: compute dtype; parameters stay float32.
        matmuls: what the product is computed in, see `product.py`.
        lora: its adapter, if the kernel is frozen, see `lora/adapter.py`.
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
        lora: Lora | None = None,
        rules: ShardingRules = DEFAULT_RULES,
    ) -> None:
        _check_options(in_size, out_size, bias, matmuls)
        self.dim, self.dtype, self.matmuls, self.rules = dim, dtype, matmuls, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), (dim, "embed"), std=std, rules=rules)
        self.bias = nnx.data(None)
        if bias == "on":
            self.bias = make_param(rngs.params(), (out_size,), ("embed",), std=0.0, rules=rules)
        self.kernel_scale = nnx.data(None)
        adapter = make_adapter(rngs, lora, self.kernel[...], (dim, "embed"), rules)
        self.lora, (self.lora_a, self.lora_b, self.lora_m) = lora, adapter
        if lora is not None and lora.base == "nf4":
            hold_nf4(self)

    def __call__(self, x_BTF: jax.Array) -> jax.Array:
        """x[B@data, T, F@tensor] -> y[B@data, T, D].

        Raises:
            ModelError: x has another number of features.
            ShardingError: F does not split over the axis of `dim`, or B over `data`.
        """
        check_features(x_BTF, self.kernel.shape[0], layer="RowLinear")
        self.rules.check_in_context((self.dim, "embed"), shape=self.kernel.shape, name="the kernel of RowLinear")
        kernel, scale = read_kernel(self)
        kernel = kernel if self.lora is None else jax.lax.stop_gradient(kernel)
        y_BTD = multiply(x_BTF, kernel, dtype=self.dtype, matmuls=self.matmuls, scale=scale)
        y_BTD = add_adapter(self, x_BTF, y_BTD, self.rules.axes(self.dim))
        # Inside `shard_map` this is the sum; under `jax.jit` the constraint makes the compiler add it.
        y_BTD = leave_split(y_BTD, self.rules.axes(self.dim), tokens=self.rules.token_axes)
        y_BTD = self.rules.constrain(y_BTD, name_dims(y_BTD, "embed", tokens="stream_tokens"))
        y_BTD = scale_columns(self, y_BTD, rows=self.rules.axes(self.dim))
        # After the all-reduce: added before it, the bias would be counted once per tensor rank.
        return y_BTD if self.bias is None else add_bias(y_BTD, self.bias[...])


class _Columns(Protocol):
    """What `ColumnLinear` and `JoinedLinear` have in common."""

    kernel: nnx.Param
    kernel_scale: Any
    dim: str
    dtype: DTypeLike
    matmuls: Matmuls
    lora: Lora | None
    lora_a: Any
    lora_b: Any
    lora_m: Any
    rules: ShardingRules


def multiply_columns(layer: _Columns, x_BTD: jax.Array) -> jax.Array:
    """Return the product of a column-parallel layer: x[B, T, D] @ kernel[D, F@axes] -> y[B, T, F@axes], without bias.

    Where tokens are split between layers x is [B, T@tokens, D], and is gathered here. The backward gathers it again:
    what is kept of it is this device's tokens (Korthikanti et al. 2022, section 4.2.2).
    """
    (kernel, scale), is_frozen, rules = read_kernel(layer), layer.lora is not None, layer.rules
    tokens, axes = rules.token_axes, rules.axes(layer.dim)

    def run(x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
        y_BTF = multiply(x_BTD, kernel, dtype=layer.dtype, matmuls=layer.matmuls, scale=scale)
        return scale_columns(layer, add_adapter(layer, x_BTD, y_BTF, axes))

    if num_blocks(tokens) == 1:
        return run(*(enter_frozen if is_frozen else enter_split)(x_BTD, kernel, axes))

    def gather_and_multiply(x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
        if is_frozen:
            x_BTD, kernel = gather_tokens(x_BTD, tokens), jax.lax.stop_gradient(kernel)
        else:
            x_BTD, kernel = enter_gathered(x_BTD, kernel, tokens)
        return run(rules.constrain(x_BTD, name_dims(x_BTD, "embed")), kernel)

    return jax.checkpoint(gather_and_multiply, prevent_cse=False)(x_BTD, kernel)


def read_kernel(layer: Any) -> tuple[jax.Array, jax.Array | None]:
    """Return a layer's kernel in the compute dtype, and the scale [F] by which its product is multiplied, if any.

    Numbers of four bits are made here, again in each pass: none of them waits for the backward.
    """
    kernel, scale = layer.kernel[...], scale_of(layer)
    if scale is not None and is_nf4(kernel):
        return dequantize_nf4(kernel, jax.lax.stop_gradient(scale), layer.dtype), None
    return kernel.astype(layer.dtype), scale


def add_bias(y: jax.Array, bias_F: jax.Array) -> jax.Array:
    """Return y[..., F] + bias[F] in the dtype of y, with explicit dimensions, as strict rank promotion demands."""
    return y + jnp.expand_dims(bias_F.astype(y.dtype), tuple(range(y.ndim - 1)))


def name_dims(y: jax.Array, last: str, *, tokens: str = "tokens") -> tuple[str | None, ...]:
    """Return the logical dimensions of y[B, ..., F]: `last` is the name of F, `tokens` of T in [B, T, F]."""
    middle: list[str | None] = [tokens] if y.ndim == 3 else [None] * y.ndim
    return (*("batch", *middle)[: y.ndim - 1], last)


def _check_options(in_size: int, out_size: int, bias: Literal["on", "off"], matmuls: Matmuls) -> None:
    check_count("in_size", in_size, error=ModelError)
    check_count("out_size", out_size, error=ModelError)
    check_choice("bias", bias, ("on", "off"), error=ModelError)
    check_choice("matmuls", matmuls, get_args(Matmuls), error=ModelError)
