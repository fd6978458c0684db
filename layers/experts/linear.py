"""A linear layer of every expert, [E@expert, in, out], with an adapter for each of them if the config has them there.

    rows[E, C, D] -> rows @ kernel + (rows @ A) B        A [E, D, r], B [E, r, F], split as their kernels are

A holds alpha / r already where it is multiplied. Read `rounds.py` next, which multiplies.
"""

from typing import Any, Literal

import jax
from flax import nnx

from ...meshes import ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying
from ..lora.adapter import make_adapter, relative_lengths
from ..lora.check_config import Lora
from ..lora.nf4 import dequantize_nf4, hold_nf4, is_nf4
from ..partitioning import make_param
from ..quantized import scale_of
from .rounds import Kernels, Weight


class ExpertLinear(nnx.Module):
    """The kernels of a linear layer of every expert, [E@expert, D, F@tensor] or [E@expert, F@tensor, D], and biases.

    Args:
        lora: its adapters, if the kernels are frozen, see `../lora/adapter.py`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dims: tuple[str, str, str],
        *,
        bias: Literal["on", "off"],
        dtype: str,
        std: float,
        rngs: nnx.Rngs,
        rules: ShardingRules,
        lora: Lora | None = None,
    ) -> None:
        self.dtype, self.dim, self.rows = dtype, dims, rules.axes(dims[1])
        self.kernel = make_param(rngs.params(), shape, dims, std=std, rules=rules)
        self.bias = nnx.data(None)
        if bias == "on":
            of_bias = (shape[0], shape[2]), (dims[0], dims[2])
            self.bias = make_param(rngs.params(), *of_bias, std=0.0, rules=rules)
        self.kernel_scale = nnx.data(None)
        adapter = make_adapter(rngs, lora, self.kernel[...], dims, rules)
        self.lora, (self.lora_a, self.lora_b, self.lora_m) = lora, adapter
        if lora is not None and lora.base == "nf4":
            hold_nf4(self)

    @property
    def weights(self) -> Weight:
        """The kernels, with their scales if they are quantized, their biases and adapters."""
        kernel, scale = self.kernel[...], scale_of(self)
        if scale is not None and is_nf4(kernel):
            kernel, scale = dequantize_nf4(kernel, jax.lax.stop_gradient(scale), self.dtype), None
        own = Weight(kernel, scale, None if self.bias is None else self.bias[...])
        if self.lora is None:
            return own
        own = jax.tree.map(jax.lax.stop_gradient, own)
        if self.lora_a is None:
            return own
        a, b = self.lora_a[...], self.lora_b[...]
        factor = None
        if self.lora_m is not None:
            factor = relative_lengths(kernel, a, b, self.lora_m[...], scale=self.lora.scale, rows=self.rows)
        return own._replace(a=a * self.lora.scale, b=b, factor=factor)

    @property
    def dims(self) -> Weight:
        """The logical dimensions of `weights`."""
        experts, d_in, d_out = self.dim
        columns = experts, d_out
        has_scale = self.kernel_scale is not None and not is_nf4(self.kernel[...])
        own = Weight(self.dim, columns if has_scale else None, None if self.bias is None else columns)
        if self.lora_a is None:
            return own
        factor = None if self.lora_m is None else columns
        return own._replace(a=(experts, d_in, "lora"), b=(experts, "lora", d_out), factor=factor)


def mark_adapters(kernels: Kernels, features: tuple[str, ...]) -> Kernels:
    """Return kernels whose adapters vary over the axes that split features, so that gradients are summed once.

    Inside the loop of further rounds a sum over tensor would be one in each.
    """
    axes = manual_axes(features)

    def mark(weight: Weight | None) -> Any:
        if weight is None or weight.a is None:
            return weight
        a, b, factor = (None if own is None else mark_varying(own, axes) for own in weight[3:])
        return weight._replace(a=a, b=b, factor=factor)

    return Kernels(up=mark(kernels.up), gate=mark(kernels.gate), down=mark(kernels.down))
