"""Attention of new tokens to cached latent vectors, without making keys and values of the cached tokens.

The map from a latent vector c to a head's key is linear, k = W c, so a query's product with it is q (W c) = (q W) c:
queries go through W instead, and all heads attend to one vector of C features a token ("absorbed", DeepSeek-V2, section
2.1.2). The same holds for values, behind the sum. A cached token costs C + R numbers for all heads together, and each
head's products are C + R and C features wide instead of H and U.
"""

import jax
import jax.numpy as jnp

from ..attention.cache import KVCache, NewTokens
from ..attention.cached import CacheScoring, attend


def attend_latents(
    q_BTNH: jax.Array,
    kernel_CNE: jax.Array,
    *,
    cache: KVCache,
    layer: jax.Array | int,
    new: NewTokens,
    window: int = 0,
) -> jax.Array:
    """Compute attention of new tokens to cached latent vectors: cached token s is visible from position s on.

    q[B@data, T, N@tensor, H], its last R features rotated, kernel[C, N@tensor, H - R + U] -> mixed[B@data, T, N@tensor,
    U]; no communication.

    It is `attend` with one key/value head: a key is [shared key, latent vector] and its value is the latent vector.

    Args:
        window: number of visible tokens, the token itself included; 0 is all.
    """
    size, num_own = q_BTNH.shape[-1], q_BTNH.shape[-1] - cache.keys.shape[-1]
    to_keys_CNE, to_values_CNU = jnp.split(kernel_CNE, [num_own], axis=-1)
    own_BTNE, turned_BTNR = jnp.split(q_BTNH, [num_own], axis=-1)
    q_BTNC = jnp.einsum("btne,cne->btnc", own_BTNE, to_keys_CNE)
    both_BTNE = jnp.concatenate([turned_BTNR, q_BTNC], axis=-1)
    scoring = CacheScoring(window=window, keys="keys_and_values", scale=size**-0.5)
    mixed_BTNC = attend(both_BTNE, cache=cache, layer=layer, new=new, scoring=scoring)
    return jnp.einsum("btnc,cnu->btnu", mixed_BTNC, to_values_CNU)
