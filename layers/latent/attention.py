"""Multi-head latent attention: keys and values of all heads from one small vector of each token.

DeepSeek-AI 2024 ("DeepSeek-V2", arXiv:2405.04434, section 2.1; the same in V3). With C = latent_size, Q =
query_latent_size, H = head_size of which R are rotated, and values of U features, V3's sizes below:

    x[D] -- query.down --> [Q] -- norm, up --> N heads of H           7168 -> 1536 -> 128 x 192
    x[D] -- latent_down -> [C] -- norm, key_value -> N heads of       7168 ->  512 -> 128 x (128 + 128)
                    |                                 H - R keys and U values
                    +----> [R] -- rotated, the keys' other features, which all heads share           64
    scores, softmax, sum of values as ever --> N heads of U -- out --> [D]

Where heads are split over tensor, the maps up and `out` are; the maps down are whole on every rank, which computes them
for all tokens, or with sequence parallelism for its own. So the all-gathers of a layer, and backward its all-reduces,
are of C + R + Q features and not of D. Without query_latent_size queries are computed from x. A server keeps the C + R
numbers of a token alone, see `absorbed.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying
from ..attention.cache import KVCache, NewTokens
from ..check_inputs import check_hidden
from ..collectives import gather_tokens
from ..config import ModelConfig
from ..context.attend import attend_in_context
from ..context.places import Places, own_positions
from ..linear import ColumnLinear, RowLinear
from ..lora.adapter import whole_kernel
from ..lora.check_config import lora_of
from ..norms import normalize
from ..partitioning import INIT_STD
from ..rope.magnitude import yarn_scale
from ..rope.rotary import rotate
from .absorbed import attend_latents
from .down import DownLinear, LatentQuery, make_latent_norm


class LatentAttention(nnx.Module):
    """Causal attention over N heads, whose keys and values are computed from a latent vector of each token.

    x[B@data, T, D] -> y[B@data, T, D], with N@tensor in between; one all-reduce of D features forward, and backward one
    each of the latent vectors.

    >>> sizes = {"vocab_size": 256, "num_layers": 1, "hidden_size": 64, "num_heads": 4, "head_size": 24, "bias": "off"}
    >>> config = ModelConfig(latent_size=32, rope_head_size=8, positions="rotary", **sizes)
    >>> LatentAttention(config, rngs=nnx.Rngs(0))(jnp.ones((2, 16, 64))).shape
    (2, 16, 64)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        d, heads, queries = config.hidden_size, config.num_heads, config.query_latent_size
        own: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs, "rules": rules}
        split: dict[str, Any] = {"dim": "heads", "bias": "off", **own}
        lora = partial(lora_of, config)
        of_x = None if queries else ColumnLinear(d, config.query_size, lora=lora("attention.query"), **split)
        self.query: ColumnLinear | LatentQuery = of_x or LatentQuery(config, **own)
        down = lora("attention.latent_down")
        self.latent_down = DownLinear(d, config.latent_size + config.rope_head_size, lora=down, **own)
        self.latent_norm = make_latent_norm(config.latent_size, **own)
        up = lora("attention.key_value")
        self.key_value = ColumnLinear(config.latent_size, heads * sum(self._sizes), lora=up, **split)
        # As in mlp.py: residual branches add up over the layers.
        std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.out = RowLinear(config.value_size, d, std=std, lora=lora("attention.out"), **split)

    def __call__(
        self, x_BTD: jax.Array, places: Places | None = None, layer: jax.Array | int | None = None
    ) -> jax.Array:
        """x[B@data, T@context, D] -> y[B@data, T@context, D].

        Args:
            places: where the tokens stand, if a sequence holds several documents.
            layer: without effect, all layers are alike.

        Raises:
            ModelError: x is not [B, T, D], or T is 0.
        """
        del layer
        check_hidden(x_BTD, self.config.hidden_size, layer="attention")
        latent_BTC, shared_BT1R = self._compress(x_BTD)
        q_BTNH, kv_BTNE = self._query(x_BTD), self.key_value(latent_BTC)
        tokens, context = self.rules.token_axes, self.rules.axes("tokens")
        shared_BT1R = gather_tokens(shared_BT1R, tokens)
        positions_BT = places.positions if places else own_positions(q_BTNH.shape[1], context)[None]
        q_BTNH = self._rotate_queries(q_BTNH, positions_BT)
        kv_BTNE = kv_BTNE.reshape(*q_BTNH.shape[:3], -1)
        k_BTNH, v_BTNU = jnp.split(kv_BTNE, [self._sizes[0]], axis=-1)
        shared_BT1R = mark_varying(shared_BT1R, manual_axes(self.rules.axes("heads")))
        shared_BT1R = rotate(shared_BT1R, config=self.config, positions_BT=positions_BT)
        shared_BTNR = jnp.broadcast_to(shared_BT1R, (*k_BTNH.shape[:3], shared_BT1R.shape[-1]))
        k_BTNH = jnp.concatenate([k_BTNH, shared_BTNR], axis=-1)
        segments_BT = places.segments if places else None
        mixed_BTNU = attend_in_context(
            q_BTNH, k_BTNH, v_BTNU, config=self.config, rules=self.rules, segments_BT=segments_BT
        )
        return self._combine(mixed_BTNU)

    def join(self) -> None:
        """Join what reads the same input: nothing here, since what is split reads vectors of its own."""

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

        x[B@data, T, D] -> y[B@data, T, D]; one all-reduce. For inference, inside `shard_map` over all axes. The cache
        has pages of rotated shared keys [1, S, R] in place of keys and of latent vectors [1, S, C] in place of values,
        whole on every device.

        Args:
            layer: position of the layer in the cache; number: without effect, all layers are alike.
        """
        del number
        positions_BT = new.positions(x_BTD.shape[1])
        latent_BTC, shared_BT1R = self._compress(x_BTD)
        shared_BT1R = rotate(shared_BT1R, config=self.config, positions_BT=positions_BT)
        cache = cache.append(layer, new, shared_BT1R, latent_BTC[:, :, None])
        q_BTNH = self._rotate_queries(self._query(x_BTD), positions_BT)
        kernel_CF = whole_kernel(self.key_value).astype(self.config.dtype)
        kernel_CNE = kernel_CF.reshape(self.config.latent_size, q_BTNH.shape[2], -1)
        window = self.config.attention_window
        mixed_BTNU = attend_latents(q_BTNH, kernel_CNE, cache=cache, layer=layer, new=new, window=window)
        return self._combine(mixed_BTNU), cache

    @property
    def _sizes(self) -> tuple[int, int]:
        """Features of a head that `key_value` makes: H - R of its key, and U of its value."""
        return self.config.head_size - self.config.rope_head_size, self.config.value_head_size

    def _compress(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the normalized latent vectors [B, T, C], and shared keys [B, T, 1, R] before rotation."""
        down_BTE = self.latent_down(x_BTD)
        latent_BTC, shared_BTR = jnp.split(down_BTE, [self.config.latent_size], axis=-1)
        return normalize(self.latent_norm, latent_BTC), shared_BTR[:, :, None]

    def _query(self, x_BTD: jax.Array) -> jax.Array:
        """x[B, T, D] -> queries [B, T, N@tensor, H], of all tokens, scaled and before rotation."""
        y_BTF = self.query(x_BTD)
        q_BTNH = y_BTF.reshape(*y_BTF.shape[:2], -1, self.config.head_size)
        # With YaRN scores are scaled once more; kernels divide them by the root of H alone.
        scale = latent_scale(self.config)
        return q_BTNH if scale == 1 else q_BTNH * scale

    def _rotate_queries(self, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        own_BTNE, turned_BTNR = jnp.split(q_BTNH, [self._sizes[0]], axis=-1)
        turned_BTNR = rotate(turned_BTNR, config=self.config, positions_BT=positions_BT)
        return jnp.concatenate([own_BTNE, turned_BTNR], axis=-1)

    def _combine(self, mixed_BTNU: jax.Array) -> jax.Array:
        mixed_BTNU = self.rules.constrain(mixed_BTNU, ("batch", "tokens", "heads", "head"))
        return self.out(mixed_BTNU.reshape(*mixed_BTNU.shape[:2], -1))


def latent_scale(config: ModelConfig) -> float:
    """Return what scores are multiplied with besides 1 / sqrt(H): the square of YaRN's scale if the config has one."""
    if config.rope_scaling != "yarn" or not config.rope_mscale_all:
        return 1.0
    return yarn_scale(config.rope_factor, config.rope_mscale_all) ** 2
