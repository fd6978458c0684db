"""Frequencies that depend on the length of a sequence (Ding et al. 2024, "LongRoPE", arXiv:2402.13753, section 3).

A model has two sets of them, for sequences of up to `rope_original_tokens`, and for longer ones. All tokens of a
sequence are rotated by one set, also the first of a long one. In training the length is that of the program's
sequences; a server knows at once how long a sequence with its longest answer can become, and rotates by that.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from .frequencies import rope_frequencies


def frequencies_by_length(config: ModelConfig, num_tokens: jax.Array | int) -> Any:
    """Return the frequencies of sequences of so many tokens; None where all have the same.

    float32 [R/2] for a number, [B, R/2] for the numbers of B sequences, int32 [B].
    """
    if config.rope_scaling != "longrope":
        return None
    if isinstance(num_tokens, int):
        return rope_frequencies(config, num_tokens=num_tokens)
    most = config.rope_original_tokens
    both = np.stack([rope_frequencies(config, num_tokens=number) for number in (most, most + 1)])
    return jnp.asarray(both)[(num_tokens > most).astype(jnp.int32)]
