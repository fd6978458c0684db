"""Rotary position embedding: positions as rotations of feature pairs (Su et al. 2021, section 3.2)."""

import jax
import jax.numpy as jnp
import numpy as np

from .config import ModelConfig


def rotate(x_BTNH: jax.Array, *, config: ModelConfig, positions_BT: jax.Array | None = None) -> jax.Array:
    """Rotate heads by the position of their token; feature i is paired with feature i + H/2, as in Llama.

    x[B@data, T, N@tensor, H] -> y[B@data, T, N@tensor, H], angles in float32; no communication.

    Args:
        config: gives the `rope_frequencies` of the pairs.
        positions_BT: position of every token in its sequence, [B@data, T] or [1, T]; 0 to T - 1 if left out.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(x_BTNH.shape[1])[None]
    angle_BTh = positions_BT.astype(jnp.float32)[..., None] * rope_frequencies(config)[None, None]
    cos, sin = jnp.cos(angle_BTh)[:, :, None], jnp.sin(angle_BTh)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angular frequency of each pair of features in radians per position, float32[H/2].

    The frequency of pair i is theta**(-2i/H). Scaling "linear" divides it by `rope_factor` (Chen et al. 2023, section
    3.2). Scaling "llama3" divides the frequency of pairs that turn fewer than `rope_low_frequency_factor` times within
    `rope_original_tokens`, keeps that of pairs that turn more than `rope_high_frequency_factor` times, and interpolates
    in between (Llama 3.1's release).
    """
    exponent_h = np.arange(0, config.head_size, 2) / config.head_size
    own_h = config.rope_theta**-exponent_h
    slow_h = own_h / config.rope_factor
    if config.rope_scaling != "llama3":
        return slow_h.astype(np.float32)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns_h = config.rope_original_tokens * own_h / (2 * np.pi)
    keep_h = np.clip((turns_h - low) / (high - low), 0, 1)
    return (keep_h * own_h + (1 - keep_h) * slow_h).astype(np.float32)
