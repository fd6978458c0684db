"""Log probabilities of the chosen tokens and of the likeliest ones, with a split vocabulary.

They are those of the model's own logits, before temperature, filters, biases and penalties, as vLLM returns them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...layers.collectives import gather_blocks, max_blocks
from ...meshes.device_axes import block_index, manual_axes
from ..requests import MOST_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log probabilities of the chosen tokens, [..., B]; the likeliest tokens and theirs, [..., B, top]."""

    chosen: Any
    top_tokens: Any
    top: Any


def num_top(vocab_size: int) -> int:
    """Return how many likeliest tokens a vocabulary has, at most `MOST_LOGPROBS`."""
    return min(MOST_LOGPROBS, vocab_size)


def compute_logprobs(
    logits_BV: jax.Array, token_B: jax.Array, *, axes: tuple[str, ...], vocab_size: int | None = None
) -> Logprobs:
    """Return log probabilities: logits[B@data, V@axes], tokens[B@data] -> [B@data] and [B@data, top].

    It costs an all-reduce of [B], another of [2, B], and two all-gathers of [B, top] over the axes.

    Args:
        vocab_size: number of tokens, behind which the logits are padding; all of them if left out.
    """
    size, manual = logits_BV.shape[1], manual_axes(axes)
    first = block_index(axes) * size
    largest_B = max_blocks(logits_BV.max(-1), axes)
    place_B = token_B - first
    is_here_B = (place_B >= 0) & (place_B < size)
    own_B = jnp.take_along_axis(logits_BV, jnp.clip(place_B, 0, size - 1)[:, None], axis=1)[:, 0]
    parts = jnp.stack([jnp.exp(logits_BV - largest_B[:, None]).sum(-1), jnp.where(is_here_B, own_B, 0.0)])
    sum_B, chosen_B = jax.lax.psum(parts, manual) if manual else parts
    log_sum_B = largest_B + jnp.log(sum_B)
    top_BE, place_BE = jax.lax.top_k(logits_BV, min(MOST_LOGPROBS, size))
    # The largest of each device's largest; of equal ones the first token, as on one device.
    all_BE, tokens_BE = gather_blocks(top_BE, axes, dim=1), gather_blocks(place_BE + first, axes, dim=1)
    top_BE, which_BE = jax.lax.top_k(all_BE, num_top(vocab_size or all_BE.shape[1]))
    return Logprobs(
        chosen=chosen_B - log_sum_B,
        top_tokens=jnp.take_along_axis(tokens_BE, which_BE, axis=1).astype(jnp.int32),
        top=top_BE - log_sum_B[:, None],
    )
