"""Causal self-attention with its heads split over `tensor`: multi-head, grouped-query and multi-query.

Query heads are column parallel, the output projection is row parallel, so a block costs one all-reduce here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ..meshes import DEFAULT_RULES, ShardingRules
from .config import ModelConfig
from .linear import INIT_STD, ColumnLinear, RowLinear
from .rotary import rotate


class Attention(nnx.Module):
    """Causal attention over N query heads that share K key/value heads (Ainslie et al. 2023, section 2.2).

    x[B@data, T, D] -> y[B@data, T, D], with N@tensor in between; one all-reduce forward, one backward.

    With fewer key/value heads than tensor ranks, their parameters are whole on every rank and each rank computes
    just the head that its query heads use; their gradients then cost one small all-reduce more.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        into = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs, "rules": rules}
        d = config.hidden_size
        self.query = ColumnLinear(d, config.query_size, dim="heads", **into)
        self.key = ColumnLinear(d, config.kv_size, dim="kv_heads", **into)
        self.value = ColumnLinear(d, config.kv_size, dim="kv_heads", **into)
        self.out = RowLinear(config.query_size, d, dim="heads", std=INIT_STD / (2 * config.num_layers) ** 0.5, **into)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        q_BTNH = self._heads(self.query(x_BTD))
        k_BTKH = self._heads(self._project_kv(self.key, x_BTD))
        v_BTKH = self._heads(self._project_kv(self.value, x_BTD))
        if self.config.positions == "rotary":
            q_BTNH = rotate(q_BTNH, theta=self.config.rope_theta)
            k_BTKH = rotate(k_BTKH, theta=self.config.rope_theta)
        mixed_BTNH = _attend(q_BTNH, k_BTKH, v_BTKH)
        mixed_BTNH = self.rules.constrain(mixed_BTNH, ("batch", "tokens", "heads", "head"))
        return self.out(mixed_BTNH.reshape(*x_BTD.shape[:2], self.config.query_size))

    def _heads(self, x_BTF: jax.Array) -> jax.Array:
        return x_BTF.reshape(*x_BTF.shape[:2], -1, self.config.head_size)

    def _project_kv(self, linear: ColumnLinear, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> heads[B@data, T, (K x copies)@tensor x H]; copies > 1 where K < tensor."""
        copies = max(1, self.rules.parts_in_context("heads") // self.config.num_kv_heads)
        if copies == 1:
            return linear(x_BTD)
        kernel_DF = self.rules.constrain(self._spread(linear.kernel[...], copies), ("embed", "heads"))
        bias_F = None if linear.bias is None else self._spread(linear.bias[...], copies)
        return linear.apply(x_BTD, kernel_DF, bias_F, dim="heads")

    def _spread(self, weight: jax.Array, copies: int) -> jax.Array:
        """weight[..., K x H] -> [..., K x copies x H]: the weight, not the activation, so that no rank works twice."""
        heads = weight.reshape(*weight.shape[:-1], self.config.num_kv_heads, 1, self.config.head_size)
        shape = (*heads.shape[:-2], copies, self.config.head_size)
        return jnp.broadcast_to(heads, shape).reshape(*weight.shape[:-1], -1)


# Kept for the backward are the scores alone, of the four arrays of [B, N, T, T] that plain autodiff keeps: the softmax
# between the two matmuls is cheap to do again.
@partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True)
