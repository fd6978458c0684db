"""Linear layers to a small vector, whole on every device of tensor, and queries that are computed from one."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from ...meshes import DEFAULT_RULES, ShardingRules
from ..check_inputs import check_features
from ..config import ModelConfig
from ..linear import ColumnLinear, name_dims
from ..norms import normalize
from ..partitioning import INIT_STD, make_param, param_metadata
from ..product import multiply
from ..quantized import scale_of

NORM_EPSILON = 1e-6
"""That of the norms of latent vectors, whatever the config has for the others: transformers fixes it."""


class DownLinear(nnx.Module):
    """x[B@data, T, D] @ kernel[D, C] -> y[B@data, T, C]; no communication, and each tensor rank computes the same.

    With sequence parallelism a rank has other tokens, and the gradients of the kernel are summed over tensor.
    """

    def __init__(
        self, in_size: int, out_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES
    ) -> None:
        self.dtype, self.rules = dtype, rules
        self.kernel = make_param(rngs.params(), (in_size, out_size), ("embed", "latent"), std=INIT_STD, rules=rules)
        self.kernel_scale = nnx.data(None)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, C].

        Raises:
            ModelError: x has another number of features.
        """
        check_features(x_BTD, self.kernel.shape[0], layer="DownLinear")
        y_BTC = multiply(x_BTD, self.kernel[...], dtype=self.dtype, scale=scale_of(self))
        return self.rules.constrain(y_BTC, name_dims(y_BTC, "latent", tokens="stream_tokens"))


class LatentQuery(nnx.Module):
    """Queries of all heads from a normalized small vector: x[B@data, T, D] -> y[B@data, T, (N H)@tensor]."""

    def __init__(self, config: ModelConfig, **own: Any) -> None:
        size = config.query_latent_size
        self.down = DownLinear(config.hidden_size, size, **own)
        self.norm = make_latent_norm(size, **own)
        self.up = ColumnLinear(size, config.query_size, dim="heads", bias="off", **own)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, (N H)@tensor], of all tokens of a context rank."""
        return self.up(normalize(self.norm, self.down(x_BTD)))


def make_latent_norm(size: int, *, dtype: Any, rngs: nnx.Rngs, rules: ShardingRules) -> nnx.RMSNorm:
    """Return the RMSNorm of a latent vector; its scale is replicated over `tensor`."""
    named = param_metadata(("latent",), rules)
    return nnx.RMSNorm(size, epsilon=NORM_EPSILON, dtype=dtype, scale_metadata=named, rngs=rngs)
