"""Change logits before a token is chosen: biases of tokens, and penalties for tokens that the sequence has already.

In the order and with the meaning of vLLM (0.11, `vllm/v1/sample`):

    1. the bias of a token is added to its logit
    2. repetition penalty r, for tokens of prompt and answer: a positive logit is divided by r, another multiplied by it
       (Keskar et al. 2019, "CTRL", section 4.1; transformers does the same)
    3. frequency penalty f and presence penalty p, for tokens of the answer alone: minus f times their number, minus p

How often a sequence has a token is counted on the devices, a row of the vocabulary for each slot. An entry holds twice
the number in the answer, plus 1 for a token of the prompt. `sampling.py` is the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...meshes.device_axes import block_index
from .settings import SamplingSettings

_IN_PROMPT, _IN_ANSWER = 1, 2


def change_logits(
    logits_BV: jax.Array, settings: SamplingSettings, *, read_seen: Callable[[], jax.Array], axes: tuple[str, ...]
) -> jax.Array:
    """Return logits[B@data, V@axes] with biases and penalties; rows without any stay as they are, to the bit.

    Args:
        read_seen: returns the counts [B@data, V@axes]; called where a row has a penalty.
    """

    def penalize(logits_BV: jax.Array) -> jax.Array:
        seen_BV = read_seen()
        repetition, frequency, presence = (
            x[:, None] for x in (settings.repetition_penalty, settings.frequency_penalty, settings.presence_penalty)
        )
        divided_BV = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
        changed_BV = jnp.where(seen_BV > 0, divided_BV, logits_BV)
        num_BV = seen_BV // _IN_ANSWER
        changed_BV -= frequency * num_BV + presence * (num_BV > 0)
        return jnp.where(is_penalized(settings)[:, None], changed_BV, logits_BV)

    has_bias = (settings.bias_tokens >= 0).any()
    biased_BV = jax.lax.cond(has_bias, lambda x: _add_biases(x, settings, axes), lambda x: x, logits_BV)
    return jax.lax.cond(is_penalized(settings).any(), penalize, lambda x: x, biased_BV)


def is_penalized(settings: SamplingSettings) -> Any:
    """Return which rows have a penalty, [B]."""
    return (settings.repetition_penalty != 1) | (settings.frequency_penalty != 0) | (settings.presence_penalty != 0)


def count_tokens(
    seen: jax.Array, token_B: jax.Array, *, row: jax.Array, is_counted_B: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    """Return counts [1, slots, V@axes] with one more token of the answers in rows `row` to `row + B`, in place."""
    row_B = row + jnp.arange(token_B.shape[0])
    place_B = jnp.where(is_counted_B, _place(token_B, seen.shape[-1], axes), seen.shape[-1])
    return seen.at[0, row_B, place_B].add(_IN_ANSWER, mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """Tokens of a prompt on each data shard: slot [data], past the last for none; tokens [data, T], padded with -1.

    `is_first`, [data], says whether the counts of the slot begin anew.
    """

    slot: Any
    tokens: Any
    is_first: Any


def note_prompt(seen: jax.Array, part: PromptPart, *, axes: tuple[str, ...]) -> jax.Array:
    """Return counts [1, slots, V@axes] with the tokens of a prompt, inside `shard_map`."""
    _, num_slots, size = seen.shape
    slot, tokens_T, is_first = part.slot[0], part.tokens[0], part.is_first[0]
    row_V = jnp.where(is_first, 0, seen[0, jnp.minimum(slot, num_slots - 1)])
    row_V = row_V.at[_place(tokens_T, size, axes)].set(_IN_PROMPT, mode="drop")
    return seen.at[0, slot].set(row_V, mode="drop")


def _add_biases(logits_BV: jax.Array, settings: SamplingSettings, axes: tuple[str, ...]) -> jax.Array:
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    place_BE = _place(settings.bias_tokens, logits_BV.shape[1], axes)
    return logits_BV.at[row_B1, place_BE].add(settings.biases, mode="drop")


def _place(token: jax.Array, size: int, axes: tuple[str, ...]) -> jax.Array:
    """Return the places of tokens in this device's block of the vocabulary; `size` for those of others, and for -1."""
    place = token - block_index(axes) * size
    return jnp.where((token >= 0) & (place >= 0) & (place < size), place, size)
