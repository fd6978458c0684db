"""Rotary position embedding: positions as rotations of feature pairs (Su et al. 2021, section 3.2)."""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, *, theta: float) -> jax.Array:
    """Return heads turned by their position; feature i is paired with feature i + H/2, as in Llama.

    x[B@data, T, N@tensor, H] -> y[B@data, T, N@tensor, H], angles in float32; no communication.

    Args:
        theta: wavelength base; pair i turns by position * theta**(-2i/H) radians.
    """
    num_tokens, head_size = x_BTNH.shape[1], x_BTNH.shape[3]
    frequency_h = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle_Th = jnp.arange(num_tokens, dtype=jnp.float32)[:, None] * frequency_h[None]
    cos, sin = jnp.cos(angle_Th)[None, :, None], jnp.sin(angle_Th)[None, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
