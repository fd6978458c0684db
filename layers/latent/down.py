"""A linear layer to a small vector, whole on every device of tensor."""

import jax
from flax import nnx
from jax.typing import DTypeLike

from ...meshes import DEFAULT_RULES, ShardingRules
from ..check_inputs import check_features
from ..linear import name_dims
from ..partitioning import INIT_STD, make_param
from ..product import multiply


class DownLinear(nnx.Module):
    """x[B@data, T, D] @ kernel[D, C] -> y[B@data, T, C]; no communication, and each tensor rank computes the same.

    With sequence parallelism a rank has other tokens, and the gradients of the kernel are summed over tensor.
    """

    def __init__(
        self, in_size: int, out_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES
    ) -> None:
        self.dtype, self.rules = dtype, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), ("embed", "latent"), std=INIT_STD, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, C].

        Raises:
            ModelError: x has another number of features.
        """
        check_features(x_BTD, self.kernel.shape[0], layer="DownLinear")
        y_BTC = multiply(x_BTD, self.kernel[...], dtype=self.dtype)
        return self.rules.constrain(y_BTC, name_dims(y_BTC, "latent", tokens="stream_tokens"))
