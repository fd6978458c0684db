"""Causal self-attention with its heads split over `tensor`: multi-head, grouped-query and multi-query.

Query heads are column parallel, the output projection is row parallel, so a block costs one all-reduce here.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import num_manual_blocks
from ..check_inputs import check_hidden
from ..config import ModelConfig
from ..context.attend import attend_in_context
from ..context.places import Places, own_positions
from ..joined_linear import JoinedLinear, join_split
from ..linear import ColumnLinear, RowLinear
from ..lora.check_config import lora_of
from ..options.by_layer import SAME_AS_ALL, LayerAttention, attention_of_layer
from ..options.qk_norm import make_qk_norm, normalize_heads
from ..options.sinks import make_sinks
from ..partitioning import INIT_STD
from ..rope.by_length import frequencies_by_length
from ..rope.rotary import rotate
from .cache import KVCache, NewTokens
from .cached import CacheScoring, attend


class Attention(nnx.Module):
    """Causal attention over N query heads that share K key/value heads (Ainslie et al. 2023, section 2.2).

    x[B@data, T, D] -> y[B@data, T, D], with N@tensor in between; one all-reduce forward, one backward.

    With fewer key/value heads than tensor ranks, their parameters are whole on every rank and each rank computes
    only the head that its query heads use; the gradients of these parameters then cost one small collective more.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        shared: dict[str, Any] = {"dtype": config.dtype, "matmuls": config.matmuls, "rngs": rngs, "rules": rules}
        d, std = config.hidden_size, INIT_STD / (2 * config.num_layers) ** 0.5
        lora = partial(lora_of, config)
        of_query: dict[str, Any] = {"dim": "heads", "bias": config.qkv_bias} | shared
        of_kv = of_query | {"dim": "kv_heads"}
        self.query = ColumnLinear(d, config.query_size, lora=lora("attention.query"), **of_query)
        self.key = ColumnLinear(d, config.kv_size, lora=lora("attention.key"), **of_kv)
        self.value = ColumnLinear(d, config.kv_size, lora=lora("attention.value"), **of_kv)
        # As in mlp.py: residual branches add up over the layers.
        own: dict[str, Any] = {"dim": "heads", "bias": config.other_bias, "std": std} | shared
        self.out = RowLinear(config.query_size, d, lora=lora("attention.out"), **own)
        self.qkv: JoinedLinear | None = nnx.data(None)
        self.query_norm = make_qk_norm(config, dim="heads", rngs=rngs, rules=rules)
        self.key_norm = make_qk_norm(config, dim="kv_heads", rngs=rngs, rules=rules)
        self.sinks = make_sinks(config, rngs=rngs, rules=rules)

    def __call__(
        self, x_BTD: jax.Array, places: Places | None = None, layer: jax.Array | int | None = None
    ) -> jax.Array:
        """x[B@data, T@context, D] -> y[B@data, T@context, D].

        Args:
            places: where the tokens stand, if a sequence holds several documents.
            layer: number of the layer in the model, if layers differ.

        Raises:
            ModelError: x is not [B, T, D], or T is 0, or layers differ and the number is missing.
        """
        check_hidden(x_BTD, self.config.hidden_size, layer="attention")
        own = attention_of_layer(self.config, layer)
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, positions_BT=places.positions if places else None, own=own)
        more: dict[str, Any] = {"segments_BT": places.segments if places else None, "is_windowed": own.is_windowed}
        more["sinks_N"] = self._sinks
        mixed_BTNH = attend_in_context(q_BTNH, k_BTKH, v_BTKH, config=self.config, rules=self.rules, **more)
        return self.combine(mixed_BTNH)

    def project(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        own: LayerAttention = SAME_AS_ALL,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values, normalized and rotated by position where the config says so.

        x[B@data, T, D] -> q[B@data, T, N@tensor, H], k and v[B@data, T, K@tensor, H]; no communication forward.

        With fewer key/value heads than tensor ranks, keys and values have a head for each rank.

        Args:
            positions_BT: position of every token in its sequence; 0 to T - 1, of all context ranks, if left out.
            own: what this layer has of its own.
            lengths_B: most tokens of each sequence; T, of all context ranks, if left out.
        """
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTKH = normalize_heads(self.query_norm, self.key_norm, q_BTNH, k_BTKH)
        if self.config.attention_scale:
            # Kernels divide scores by the root of H.
            factor = self.config.attention_scale * self.config.head_size**0.5
            q_BTNH = q_BTNH if factor == 1 else q_BTNH * factor
        if self.config.positions == "rotary":
            frequencies = own.frequencies
            if frequencies is None:
                length = q_BTNH.shape[1] * num_manual_blocks(self.rules.axes("tokens"))
                frequencies = frequencies_by_length(self.config, length if lengths_B is None else lengths_B)
            if positions_BT is None:
                positions_BT = own_positions(q_BTNH.shape[1], self.rules.axes("tokens"))[None]
            how: dict[str, Any] = {"positions_BT": positions_BT, "frequencies": frequencies}
            how |= {"config": self.config, "magnitude": own.magnitude}
            q_BTNH, k_BTKH = rotate(q_BTNH, **how), rotate(k_BTKH, **how)
        return q_BTNH, k_BTKH, v_BTKH

    def join(self) -> None:
        """Replace the projections to queries, keys and values by one joined layer, where heads are split.

        Without this every call joins them again, which in a loop copies their kernels in every iteration.
        """
        self.qkv = self._join()
        if self.qkv is not None:
            del self.query, self.key, self.value

    def combine(self, mixed_BTNH: jax.Array) -> jax.Array:
        """Return the output projection of the heads' outputs; one all-reduce.

        mixed[B@data, T, N@tensor, H] -> y[B@data, T, D]
        """
        mixed_BTNH = self.rules.constrain(mixed_BTNH, ("batch", "tokens", "heads", "head"))
        return self.out(mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1))

    def extend(
        self,
        x_BTD: jax.Array,
        *,
        cache: KVCache,
        layer: jax.Array | int,
        new: NewTokens,
        number: jax.Array | int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Return attention of new tokens to the cached ones and to each other, and the cache with the new tokens.

        x[B@data, T, D] -> y[B@data, T, D]; one all-reduce. For inference, inside `shard_map` over all axes: each device
        has its own query heads and the key/value heads that they use. T is 1 in decode, the chunk's size in prefill.

        Args:
            layer: position of the layer in the cache; number: that in the model, if layers differ.
        """
        positions_BT = new.positions(x_BTD.shape[1])
        own = attention_of_layer(self.config, number)
        most_B = jnp.full(x_BTD.shape[:1], self.config.max_tokens) if new.most is None else new.most
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, positions_BT=positions_BT, own=own, lengths_B=most_B)
        cache = cache.append(layer, new, k_BTKH, v_BTKH)
        how: dict[str, Any] = {"window": self.config.attention_window, "cap": self.config.attention_softcap}
        scoring = CacheScoring(**how, is_windowed=own.is_windowed, sinks=self._sinks)
        mixed_BTNH = attend(q_BTNH, cache=cache, layer=layer, new=new, scoring=scoring)
        return self.combine(mixed_BTNH), cache

    @property
    def _sinks(self) -> jax.Array | None:
        return None if self.sinks is None else self.sinks[...]

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute x[B@data, T, D] -> queries [B@data, T, N@tensor, H], keys and values [B@data, T, K@tensor, H].

        One matmul where heads are split: three would each all-reduce their own dx in the backward.
        """
        joined = self.qkv or self._join()
        projected = joined(x_BTD) if joined else [linear(x_BTD) for linear in (self.query, self.key, self.value)]
        q, k, v = (y.reshape(*y.shape[:2], -1, self.config.head_size) for y in projected)
        return q, k, v

    def _join(self) -> JoinedLinear | None:
        return join_split((self.query, self.key, self.value), unit=self.config.head_size)
