"""Choose tokens from logits with a split vocabulary: greedy, or drawn with temperature, min-p, top-k and top-p.

Biases and penalties come first (`penalties.py`), then what a constraint allows (`allowed.py`), the temperature and the
filters. Min-p keeps the tokens with at
least this share of the probability of the likeliest (Nguyen et al. 2024, section 3), top-k the k likeliest ones (Fan et
al. 2018, section 5.4), top-p the likeliest with a total probability of p (Holtzman et al. 2020, section 3.1), in this
order, which is vLLM's. A draw adds Gumbel noise to the logits and takes the largest (Maddison et al. 2014,
"A* sampling", section 2).

The settings are data, one row per sequence, so one program serves all requests. The noise of a draw depends only on the
request's seed and the token's position, so the tokens are the same on any mesh, in any slot and beside any other
requests. Read `stage.py` for the caller.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...layers.collectives import gather_blocks, max_blocks
from ...meshes.device_axes import block_index, mark_varying, num_manual_blocks, varying_axes
from .allowed import drop_forbidden
from .logprobs import Logprobs, compute_logprobs, num_top
from .penalties import change_logits
from .settings import SamplingSettings

NOTHING = -1
"""A placeholder for the token of a slot that is not in use."""

NOT_FINITE = -3
"""A placeholder for the token where logits are NaN or infinite."""

_MIN_TEMPERATURE = 1e-30
"""The lowest temperature for a draw: below it logits would overflow, and draws are greedy long before."""


class Choice(NamedTuple):
    """Chosen tokens and their finish reasons, [..., B]; log probabilities, which are zeros if no row wants any."""

    token: Any
    reason: Any
    logprobs: Logprobs


def no_choice(shape: tuple[int, ...], *, vocab_size: int) -> Choice:
    """Return a choice of this shape in which nothing is chosen."""
    top = (*shape, num_top(vocab_size))
    logprobs = Logprobs(chosen=jnp.zeros(shape), top_tokens=jnp.zeros(top, jnp.int32), top=jnp.zeros(top))
    return Choice(jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.int32), logprobs)


def choose(
    logits_BV: jax.Array,
    settings: SamplingSettings,
    *,
    read_seen: Callable[[], jax.Array],
    read_allowed: Callable[[], jax.Array],
    position_B: jax.Array,
    axes: tuple[str, ...],
    vocab_size: int | None = None,
) -> Choice:
    """Choose one token per row: logits[B@data, V@tensor] in float32 -> tokens[B@data].

    For use inside `shard_map`, where the logits are this device's block of the vocabulary over `axes`. It costs two
    all-reduces of [B] over these axes (the best score and its token); if any row has min-p another one, if any has
    top-k or top-p an all-gather of the logits, and if any wants log probabilities those of `compute_logprobs`. A row
    with logits that are not finite gets `NOT_FINITE` on every device.

    Args:
        read_seen: returns how often each sequence has each token [B@data, V@tensor], as `penalties.py` counts them.
        read_allowed: returns the bits of the tokens that constrained rows may choose [B@data, W], as `allowed.py` reads
            them.
        position_B: positions of the tokens to choose in their sequences.
        vocab_size: number of tokens, behind which the logits are padding; all of them if left out.
    """
    vocab_size = logits_BV.shape[-1] * num_manual_blocks(axes) if vocab_size is None else vocab_size
    changed_BV = change_logits(logits_BV, settings, read_seen=read_seen, axes=axes)
    changed_BV = jax.lax.cond(
        settings.is_constrained.any(),
        lambda x: drop_forbidden(x, settings, read_allowed(), axes=axes),
        lambda x: x,
        changed_BV,
    )
    scores_BV = _score(changed_BV, settings, position_B, axes, vocab_size)
    # From the original logits, since a filter may drop a NaN. The maximum is NaN if any logit is.
    token_B = _find_largest(scores_BV, is_finite_B=jnp.isfinite(logits_BV.max(-1)), axes=axes)
    reason_B = finish_reasons(token_B, settings, length_B=position_B + 1)
    return Choice(token_B, reason_B, _logprobs(logits_BV, token_B, settings, axes, vocab_size))


def _score(
    changed_BV: jax.Array, settings: SamplingSettings, position_B: jax.Array, axes: tuple[str, ...], vocab_size: int
) -> jax.Array:
    """Return scores of which the largest is the choice: logits by temperature and filters, with noise for a draw."""
    # A row of temperature 0 is divided by 1 and gets no noise.
    is_drawn_B = settings.temperature > 0
    scaled_BV = changed_BV / jnp.where(is_drawn_B, jnp.maximum(settings.temperature, _MIN_TEMPERATURE), 1.0)[:, None]
    has_least_B = is_drawn_B & (settings.min_p > 0)
    scaled_BV = jax.lax.cond(has_least_B.any(), lambda x: _drop_unlikely(x, settings, axes), lambda x: x, scaled_BV)
    is_cut_B = is_drawn_B & ((settings.top_k > 0) | (settings.top_p < 1))
    cut_BV = jax.lax.cond(is_cut_B.any(), lambda x: _cut(x, settings, is_cut_B, axes), lambda x: x, scaled_BV)

    def add_noise(x_BV: jax.Array) -> jax.Array:
        return jnp.where(is_drawn_B[:, None], x_BV + _noise(x_BV, settings, position_B, axes, vocab_size), x_BV)

    return jax.lax.cond(is_drawn_B.any(), add_noise, lambda x: x, cut_BV)


def _find_largest(scores_BV: jax.Array, *, is_finite_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return the token with the largest score of each row [B]."""
    top_B, token_B = scores_BV.max(-1), scores_BV.argmax(-1).astype(jnp.int32)
    # Of equal scores the first token wins, as in argmax on one device.
    token_B = token_B + block_index(axes) * scores_BV.shape[-1]
    token_B = jnp.where(top_B < max_blocks(top_B, axes), jnp.iinfo(jnp.int32).max, token_B)
    # NOT_FINITE is less than any token, so the minimum carries it from one device to all.
    return -max_blocks(-jnp.where(is_finite_B, token_B, NOT_FINITE), axes)


def _logprobs(
    logits_BV: jax.Array, token_B: jax.Array, settings: SamplingSettings, axes: tuple[str, ...], vocab_size: int
) -> Logprobs:
    """Return log probabilities if any row wants them."""

    def compute(logits_BV: jax.Array) -> Logprobs:
        return compute_logprobs(logits_BV, token_B, axes=axes, vocab_size=vocab_size)

    def leave_out(_logits_BV: jax.Array) -> Logprobs:
        none = no_choice(token_B.shape, vocab_size=vocab_size).logprobs
        # The same on all devices that split the vocabulary, but not on those of other sequences.
        return jax.tree.map(lambda x: mark_varying(x, varying_axes(token_B)), none)

    return jax.lax.cond((settings.num_logprobs >= 0).any(), compute, leave_out, logits_BV)


def _drop_unlikely(scaled_BV: jax.Array, settings: SamplingSettings, axes: tuple[str, ...]) -> jax.Array:
    """Set logits of tokens below min-p to minus infinity."""
    # The logarithm of 0 is minus infinity, which drops none.
    least_B = max_blocks(scaled_BV.max(-1), axes) + jnp.log(settings.min_p)
    return jnp.where(scaled_BV < least_B[:, None], -jnp.inf, scaled_BV)


def _noise(
    like_BV: jax.Array, settings: SamplingSettings, position_B: jax.Array, axes: tuple[str, ...], vocab_size: int
) -> jax.Array:
    """Return Gumbel noise for this device's block: argmax(logits + noise) is a draw from softmax(logits)."""
    size = like_BV.shape[-1]
    padding = size * num_manual_blocks(axes) - vocab_size

    def draw(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,), jnp.float32)

    noise_BV = jnp.pad(jax.vmap(draw)(settings.seed, position_B), [(0, 0), (0, padding)])
    return jax.lax.dynamic_slice_in_dim(noise_BV, block_index(axes) * size, size, axis=1)


def _cut(scaled_BV: jax.Array, settings: SamplingSettings, is_cut_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Set logits outside of top-k and then of top-p to minus infinity; ties with the last one inside stay.

    Both filters keep the logits from some least one up, which is searched for among integers in the order of floats.
    With logits 3, 2, 2, 1 and top_k=2 the least is 2, since 3 logits are at least 2 and only one is more.
    """
    whole_BV = gather_blocks(scaled_BV, axes, dim=1)
    order_BV, num_tokens = _ordered(whole_BV), whole_BV.shape[1]
    wanted_B = jnp.where(settings.top_k > 0, settings.top_k, num_tokens)
    least_B = _largest(lambda least_B: (order_BV >= least_B[:, None]).sum(-1) >= wanted_B, like_B=order_BV[:, 0])
    share_BV = jax.nn.softmax(jnp.where(order_BV >= least_B[:, None], whole_BV, -jnp.inf), axis=-1)

    def has_mass(least_B: jax.Array) -> jax.Array:
        return jnp.where(order_BV >= least_B[:, None], share_BV, 0.0).sum(-1) >= settings.top_p

    # The sum of all shares may round to less than a top-p near 1; then all tokens in top-k stay.
    least_B = jnp.where(settings.top_p < 1, jnp.maximum(least_B, _largest(has_mass, like_B=least_B)), least_B)
    # A top-p that float32 rounds to 0 would keep no token; keep the likeliest.
    least_B = jnp.minimum(least_B, order_BV.max(-1))
    is_in_BV = (_ordered(scaled_BV) >= least_B[:, None]) | ~is_cut_B[:, None]
    return jnp.where(is_in_BV, scaled_BV, -jnp.inf)


def _largest(holds: Callable[[jax.Array], jax.Array], *, like_B: jax.Array) -> jax.Array:
    """Find the largest 32-bit number for which a monotone condition holds, bit by bit, without sorting.

    From the highest bit down, a bit is set if the condition still holds. With 3 bits and "at most 5": 100 holds, 110
    does not, 101 does.
    """

    def try_bit(turn: jax.Array, found_B: jax.Array) -> jax.Array:
        trial_B = found_B | (jnp.uint32(1) << (31 - turn).astype(jnp.uint32))
        return jnp.where(holds(trial_B), trial_B, found_B)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(like_B))


def _ordered(x: jax.Array) -> jax.Array:
    """Map floats to 32-bit unsigned integers of the same order.

    Positive floats have the order of their bits, so they get the highest bit; negative ones have the reverse order, so
    their bits are inverted.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def finish_reasons(token_B: jax.Array, settings: SamplingSettings, *, length_B: jax.Array) -> jax.Array:
    """Return finish reasons [B]: 0 the sequence continues, 1 a stop token, 2 its limit, 3 logits are not finite."""
    is_stop_B = (settings.stops == token_B[:, None]).any(-1)
    reason_B = jnp.where(is_stop_B, 1, jnp.where(length_B >= settings.limit, 2, 0))
    return jnp.where(token_B == NOT_FINITE, 3, reason_B).astype(jnp.int32)
