"""Keep the tokens that a constraint allows: a bit for each, from the host (`../constraints/masks.py`)."""

import jax
import jax.numpy as jnp

from ...meshes.device_axes import block_index
from .settings import SamplingSettings

_BITS = 32


def num_words(vocab_size: int) -> int:
    """Return the number of words with a bit for each token."""
    return -(-vocab_size // _BITS)


def drop_forbidden(
    logits_BV: jax.Array, settings: SamplingSettings, allowed_BW: jax.Array, *, axes: tuple[str, ...]
) -> jax.Array:
    """Return logits[B@data, V@axes], minus infinity for tokens without a bit in allowed[B@data, W] where it counts.

    Every device has all words, and reads those of its block of the vocabulary, which may begin inside of a word.
    """
    size = logits_BV.shape[1]
    token_V = block_index(axes) * size + jnp.arange(size)
    # Padding of the vocabulary behind the last word has no bits.
    word_BV = jnp.take(allowed_BW, token_V // _BITS, axis=1, mode="fill", fill_value=0)
    bit_BV = (word_BV >> (token_V % _BITS).astype(jnp.uint32)[None]) & jnp.uint32(1)
    return jnp.where((bit_BV == 1) | ~settings.is_constrained[:, None], logits_BV, -jnp.inf)
