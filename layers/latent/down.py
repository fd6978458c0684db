"""Linear layers to a small vector, whole on every device of tensor, and queries that are computed from one."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from ...meshes import DEFAULT_RULES, ShardingRules
from ..check_inputs import check_features
from ..config import ModelConfig
from ..linear import ColumnLinear, name_dims, read_kernel
from ..lora.adapter import add_adapter, make_adapter, scale_columns
from ..lora.check_config import Lora, lora_of
from ..lora.nf4 import hold_nf4, num_inputs
from ..norms import normalize
from ..partitioning import INIT_STD, make_param, param_metadata
from ..product import multiply

NORM_EPSILON = 1e-6
"""That of the norms of latent vectors, whatever the config has for the others: transformers fixes it."""


class DownLinear(nnx.Module):
    """x[B@data, T, D] @ kernel[D, C] -> y[B@data, T, C]; no communication, and each tensor rank computes the same.

    With sequence parallelism a rank has other tokens, and the gradients of the kernel are summed over tensor.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        lora: Lora | None = None,
        rules: ShardingRules = DEFAULT_RULES,
    ) -> None:
        self.dtype, self.rules, dims = dtype, rules, ("embed", "latent")
        self.kernel = make_param(rngs.params(), (in_size, out_size), dims, std=INIT_STD, rules=rules)
        self.kernel_scale = nnx.data(None)
        adapter = make_adapter(rngs, lora, self.kernel[...], dims, rules)
        self.lora, (self.lora_a, self.lora_b, self.lora_m) = lora, adapter
        if lora is not None and lora.base == "nf4":
            hold_nf4(self)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, C].

        Raises:
            ModelError: x has another number of features.
        """
        check_features(x_BTD, num_inputs(self), layer="DownLinear")
        kernel, scale = read_kernel(self)
        kernel = kernel if self.lora is None else jax.lax.stop_gradient(kernel)
        y_BTC = multiply(x_BTD, kernel, dtype=self.dtype, scale=scale)
        y_BTC = scale_columns(self, add_adapter(self, x_BTD, y_BTC, ()))
        return self.rules.constrain(y_BTC, name_dims(y_BTC, "latent", tokens="stream_tokens"))


class LatentQuery(nnx.Module):
    """Queries of all heads from a normalized small vector: x[B@data, T, D] -> y[B@data, T, (N H)@tensor]."""

    def __init__(self, config: ModelConfig, **own: Any) -> None:
        size = config.query_latent_size
        down, up = (lora_of(config, f"attention.query.{name}") for name in ("down", "up"))
        self.down = DownLinear(config.hidden_size, size, lora=down, **own)
        self.norm = make_latent_norm(size, **own)
        self.up = ColumnLinear(size, config.query_size, dim="heads", bias="off", lora=up, **own)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, (N H)@tensor], of all tokens of a context rank."""
        return self.up(normalize(self.norm, self.down(x_BTD)))


def make_latent_norm(size: int, *, dtype: Any, rngs: nnx.Rngs, rules: ShardingRules) -> nnx.RMSNorm:
    """Return the RMSNorm of a latent vector; its scale is replicated over `tensor`."""
    named = param_metadata(("latent",), rules)
    return nnx.RMSNorm(size, epsilon=NORM_EPSILON, dtype=dtype, scale_metadata=named, rngs=rngs)
