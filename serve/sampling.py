"""The next token from logits whose vocabulary is split: greedy, or drawn with temperature, top-k and top-p.

How to choose is data, a row for each sequence, so one program serves all. Noise comes from the request's seed and the
token's position alone: what is drawn depends on no mesh, slot or neighbour. Read `stage.py` for the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

NOT_FINITE = -3
"""In place of a token: of NaN or infinite logits none is the likeliest."""

_COLDEST = 1e-30
"""Below this temperature scaled logits would overflow, and draws were the likeliest token long before."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Choice:
    """How each of B sequences chooses its tokens, and when it ends; all leaves [B@data], stops [B@data, E].

    Args:
        temperature: what logits are divided by before a draw; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1 for all.
        seed: of the draws.
        limit: tokens of prompt and answer together, at which the sequence ends.
        stops: tokens that end it; -1 where there are fewer.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    limit: Any
    stops: Any


def choose(logits_BV: jax.Array, choice: Choice, *, position_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return one token for each row: logits[B@data, V@tensor] in float32 -> tokens[B@data].

    Inside `shard_map`: the logits are this device's block of the vocabulary over `axes`. Costs two all-reduces of [B]
    over them (the best score, its token); where some row has top-k or top-p also one all-gather of the logits. A row
    whose logits are not finite gets `NOT_FINITE`, on every device.

    Args:
        position_B: the place in its sequence of the token to choose.
    """
    # A row of temperature 0 is divided by 1 and gets no noise.
    is_drawn_B = choice.temperature > 0
    scaled_BV = logits_BV / jnp.where(is_drawn_B, jnp.maximum(choice.temperature, _COLDEST), 1.0)[:, None]
    is_cut_B = is_drawn_B & ((choice.top_k > 0) | (choice.top_p < 1))
    cut_BV = jax.lax.cond(is_cut_B.any(), lambda x: _cut(x, choice, is_cut_B, axes), lambda x: x, scaled_BV)
    noisy_BV = jax.lax.cond(
        is_drawn_B.any(), lambda x: jnp.where(is_drawn_B[:, None], x + _noise(x, choice, position_B, axes), x),
        lambda x: x, cut_BV,
    )  # fmt: skip
    top_B, token_B = noisy_BV.max(-1), noisy_BV.argmax(-1).astype(jnp.int32)
    # Of the logits as they are: a filter may drop a NaN. The largest is NaN where any is.
    is_finite_B = jnp.isfinite(logits_BV.max(-1))
    if not axes:
        return jnp.where(is_finite_B, token_B, NOT_FINITE)
    best_B = jax.lax.pmax(top_B, axes)
    # Of equal scores the first token wins, as argmax has it on one device.
    token_B = token_B + jax.lax.axis_index(axes) * logits_BV.shape[-1]
    token_B = jnp.where(top_B < best_B, jnp.iinfo(jnp.int32).max, token_B)
    # Below all tokens, so what one device has seen is what all say.
    return jax.lax.pmin(jnp.where(is_finite_B, token_B, NOT_FINITE), axes)


def _noise(like_BV: jax.Array, choice: Choice, position_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gumbel noise for this device's block: the largest sum of logits and noise is a draw from their softmax."""
    size = like_BV.shape[-1]
    num_tokens = size * (jax.lax.axis_size(axes) if axes else 1)

    def draw(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (num_tokens,), jnp.float32)

    noise_BV = jax.vmap(draw)(choice.seed, position_B)
    return jax.lax.dynamic_slice_in_dim(noise_BV, jax.lax.axis_index(axes) * size, size, axis=1) if axes else noise_BV


def _cut(scaled_BV: jax.Array, choice: Choice, is_cut_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The logits with those out of top-k, and then of top-p, at minus infinity; ties with the last one in stay in."""
    whole_BV = jax.lax.all_gather(scaled_BV, axes, axis=1, tiled=True) if axes else scaled_BV
    order_BV, num_tokens = _ordered(whole_BV), whole_BV.shape[1]
    wanted_B = jnp.where(choice.top_k > 0, choice.top_k, num_tokens)
    least_B = _largest(lambda least_B: (order_BV >= least_B[:, None]).sum(-1) >= wanted_B, like_B=order_BV[:, 0])
    share_BV = jax.nn.softmax(jnp.where(order_BV >= least_B[:, None], whole_BV, -jnp.inf), axis=-1)

    def has_mass(least_B: jax.Array) -> jax.Array:
        return jnp.where(order_BV >= least_B[:, None], share_BV, 0.0).sum(-1) >= choice.top_p

    # A sum of all shares may round to less than a top-p near 1: then everything of top-k stays.
    least_B = jnp.where(choice.top_p < 1, jnp.maximum(least_B, _largest(has_mass, like_B=least_B)), least_B)
    # A top-p that float32 takes for 0 is reached by nobody: then the likeliest stays.
    least_B = jnp.minimum(least_B, order_BV.max(-1))
    is_in_BV = (_ordered(scaled_BV) >= least_B[:, None]) | ~is_cut_B[:, None]
    return jnp.where(is_in_BV, scaled_BV, -jnp.inf)


def _largest(holds: Callable[[jax.Array], jax.Array], *, like_B: jax.Array) -> jax.Array:
    """The largest 32-bit number for which something holds that holds for all smaller ones: bit by bit, no sorting."""

    def try_bit(turn: jax.Array, found_B: jax.Array) -> jax.Array:
        trial_B = found_B | (jnp.uint32(1) << (31 - turn).astype(jnp.uint32))
        return jnp.where(holds(trial_B), trial_B, found_B)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(like_B))


def _ordered(x: jax.Array) -> jax.Array:
    """Numbers of 32 bits in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def ends(token_B: jax.Array, choice: Choice, *, length_B: jax.Array) -> jax.Array:
    """Return why each sequence ends with a token, [B]: 0 it does not, 1 a stop token, 2 its length, 3 there is none."""
    is_stop_B = (choice.stops == token_B[:, None]).any(-1)
    reason_B = jnp.where(is_stop_B, 1, jnp.where(length_B >= choice.limit, 2, 0))
    return jnp.where(token_B == NOT_FINITE, 3, reason_B).astype(jnp.int32)
