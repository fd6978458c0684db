"""Rotary position embedding: positions as rotations of feature pairs (Su et al. 2021, section 3.2)."""

from typing import Any

import jax
import jax.numpy as jnp

from ..config import ModelConfig
from .frequencies import rope_frequencies
from .magnitude import rope_magnitude


def rotate(
    x_BTNH: jax.Array,
    *,
    config: ModelConfig,
    positions_BT: jax.Array | None = None,
    frequencies: jax.Array | None = None,
    magnitude: jax.Array | None = None,
) -> jax.Array:
    """Rotate the first R features of heads by the position of their token, for R = `config.rotated_size`.

    x[B@data, T, N@tensor, H] -> y[B@data, T, N@tensor, H], angles in float32; no communication. Feature i is paired
    with feature i + R/2, as in Llama, or feature 2i with 2i + 1 where keys come from latents, as in DeepSeek's models.

    Args:
        config: gives the `rope_frequencies` of the pairs.
        positions_BT: position of every token in its sequence, [B@data, T] or [1, T]; 0 to T - 1 if left out.
        frequencies, magnitude: those of this layer, [R/2] and [], if layers differ; [B, R/2] if sequences do.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(x_BTNH.shape[1])[None]
    size = config.rotated_size
    own: Any = rope_frequencies(config, num_tokens=x_BTNH.shape[1]) if frequencies is None else frequencies
    own_B1h = own[:, None] if own.ndim == 2 else own[None, None]
    angle_BTh = positions_BT.astype(jnp.float32)[..., None] * own_B1h
    factor = rope_magnitude(config) if magnitude is None else magnitude
    cos, sin = (factor * turn(angle_BTh)[:, :, None] for turn in (jnp.cos, jnp.sin))
    turned = x_BTNH[..., :size].astype(jnp.float32)
    if config.latent_size:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x_BTNH.dtype)
    return turned if size == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., size:]], axis=-1)
