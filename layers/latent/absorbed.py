"""Attention of new tokens to cached latent vectors, without making keys and values of the cached tokens.

The map from a latent vector c to a head's key is linear, k = W c, so a query's product with it is q (W c) = (q W) c:
queries go through W instead, and all heads attend to one vector of C features a token ("absorbed", DeepSeek-V2, section
2.1.2). The same holds for values, behind the sum. A cached token costs C + R numbers for all heads together, and each
head's products are C + R and C features wide instead of H and U.
"""

import math

import jax
import jax.numpy as jnp

from ..cache import visible


def attend_latents(
    q_BTNH: jax.Array,
    shared_BSR: jax.Array,
    latent_BSC: jax.Array,
    kernel_CNE: jax.Array,
    positions_BT: jax.Array,
    *,
    window: int = 0,
) -> jax.Array:
    """Compute attention of new tokens to cached ones: cached token s is visible from position s on.

    q[B@data, T, N@tensor, H], shared keys[B@data, S, R], latent vectors[B@data, S, C], kernel[C, N@tensor, H - R + U]
    -> mixed[B@data, T, N@tensor, U]; no communication. Scores are float32. Unused places of the shared keys may hold
    anything, those of the latent vectors any finite number.

    Args:
        window: number of visible tokens, the token itself included; 0 is all.
    """
    dtype, size = q_BTNH.dtype, q_BTNH.shape[-1]
    shared_BSR, latent_BSC = shared_BSR.astype(dtype), latent_BSC.astype(dtype)
    num_own = size - shared_BSR.shape[-1]
    to_keys_CNE, to_values_CNU = jnp.split(kernel_CNE, [num_own], axis=-1)
    own_BTNE, turned_BTNR = jnp.split(q_BTNH, [num_own], axis=-1)
    q_BTNC = jnp.einsum("btne,cne->btnc", own_BTNE, to_keys_CNE)
    scores_BNTS = jnp.einsum("btnc,bsc->bnts", q_BTNC, latent_BSC, preferred_element_type=jnp.float32)
    scores_BNTS += jnp.einsum("btnr,bsr->bnts", turned_BTNR, shared_BSR, preferred_element_type=jnp.float32)
    seen_BTS = visible(positions_BT, num_cached=latent_BSC.shape[1], window=window)
    scores_BNTS = jnp.where(seen_BTS[:, None], scores_BNTS / math.sqrt(size), -jnp.inf)
    shares_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(dtype)
    mixed_BTNC = jnp.einsum("bnts,bsc->btnc", shares_BNTS, latent_BSC)
    return jnp.einsum("btnc,cnu->btnu", mixed_BTNC, to_values_CNU)
