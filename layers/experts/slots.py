"""Lay the tokens of each expert side by side, and bring the results back, with gathers alone.

A token and one of its experts is a pair; the pairs of an expert stand in the order of their tokens. An expert has room
for C of them at a time, so that arrays have one shape whatever the router does. Worked example, 4 tokens, k = 1, E = 2,
C = 2, experts [0, 1, 0, 0]:

    round 0     expert 0: tokens 0 2     expert 1: token 1 and an empty row
    round 1     expert 0: token 3        expert 1: nothing

What exceeds the room of one round takes part in the next. Both directions are gathers, each the transpose of the other;
by autodiff the transpose of a gather would be a scatter that adds, slow on GPUs and in another order each time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes.device_axes import mark_varying, sum_like, varying_axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Order:
    """The pairs of this device's n tokens by expert.

    by_expert: int32 [n k], the pairs in the order of their experts, pair = token x k + place among its experts.
    rank: int32 [n, k], the place of a pair among those of its expert.
    experts: int32 [n, k].
    counts, starts: int32 [E], pairs of each expert, and of those before it.
    """

    by_expert: jax.Array
    rank: jax.Array
    experts: jax.Array
    counts: jax.Array
    starts: jax.Array


_BLOCK = 128
"""Pairs that are compared with each other to count those before one: its square is what a block costs."""


def order_pairs(experts_nk: jax.Array, *, num_experts: int) -> Order:
    """Return the order of the pairs of tokens and experts, stable, by counting.

    A pair comes after those of its expert in earlier blocks of 128 pairs, and those before it in its own. Counts are in
    order without a sort, which on an H100 takes three times as long.
    """
    pairs = experts_nk.reshape(-1)
    size = pairs.size
    # What fills the last block belongs to no expert.
    blocks = jnp.pad(pairs, (0, -size % _BLOCK), constant_values=num_experts).reshape(-1, _BLOCK)
    in_blocks = jax.nn.one_hot(blocks, num_experts, dtype=jnp.int32).sum(1)
    counts = in_blocks.sum(0)
    starts = jnp.cumsum(counts) - counts
    earlier = jnp.take_along_axis(jnp.cumsum(in_blocks, axis=0) - in_blocks, jnp.minimum(blocks, num_experts - 1), 1)
    is_before = np.tril(np.ones((_BLOCK, _BLOCK), bool), -1)
    own = ((blocks[:, :, None] == blocks[:, None]) & is_before[None]).sum(-1, dtype=jnp.int32)
    rank = (earlier + own).reshape(-1)[:size]
    # jax.numpy's numbers have the type of those of all devices alike, where the pairs differ.
    numbers = mark_varying(jnp.arange(size, dtype=jnp.int32), varying_axes(pairs))
    by_expert = jnp.zeros_like(numbers).at[starts[pairs] + rank].set(numbers, unique_indices=True)
    return Order(
        by_expert=by_expert, rank=rank.reshape(experts_nk.shape), experts=experts_nk, counts=counts, starts=starts
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """The pairs of one round in rows [E x C].

    pairs: int32 [E C], the pair of each row; n k for an empty one.
    rows: int32 [n, k], the row of each pair; E C for one of another round.
    """

    pairs: jax.Array
    rows: jax.Array


def round_slots(order: Order, number: jax.Array | int, *, capacity: int) -> Slots:
    """Return the rows of a round, in which each expert has room for `capacity` pairs."""
    num_experts, num_pairs = order.counts.size, order.by_expert.size
    first = jnp.asarray(number, jnp.int32) * capacity
    place = first + jnp.arange(capacity, dtype=jnp.int32)[None]
    found = order.by_expert.at[order.starts[:, None] + place].get(mode="fill", fill_value=num_pairs)
    pairs = jnp.where(place < order.counts[:, None], found, num_pairs).reshape(-1)
    is_in = (order.rank >= first) & (order.rank < first + capacity)
    rows = jnp.where(is_in, order.experts * capacity + order.rank - first, num_experts * capacity)
    return Slots(pairs=pairs, rows=rows)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Return rows of x[n, ...]; zeros for a row n."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _no_gradient(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_rows(x_nD: jax.Array, slots: Slots, num_choices: int) -> jax.Array:
    """Return the token of each row: x[n, D] -> [E C, D], zeros in empty rows; k is the number of choices."""
    return _take(x_nD, slots.pairs // num_choices)


def _to_rows_backward(_: int, saved: tuple[Slots, jax.Array], grad: jax.Array) -> tuple[jax.Array, Any]:
    slots, like = saved
    dx = _take(grad, slots.rows).astype(jnp.float32).sum(1).astype(grad.dtype)
    return sum_like(dx, like), _no_gradient(slots)


to_rows.defvjp(lambda x, slots, k: (to_rows(x, slots, k), (slots, x[:0])), _to_rows_backward)


@jax.custom_vjp
def from_rows(y_SD: jax.Array, weights_nk: jax.Array, slots: Slots) -> jax.Array:
    """Return the weighted sum of each token's rows: y[E C, D], weights[n, k] -> [n, D]; no rows of other rounds."""
    picked = _take(y_SD, slots.rows).astype(jnp.float32)
    return (picked * weights_nk[..., None]).sum(1).astype(y_SD.dtype)


def _from_rows_backward(saved: tuple[jax.Array, jax.Array, Slots], grad: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    y, weights, slots = saved
    wide = grad.astype(jnp.float32)
    scale = _take(weights.reshape(-1), slots.pairs)
    dy = (_take(wide, slots.pairs // weights.shape[1]) * scale[:, None]).astype(y.dtype)
    dweights = (_take(y, slots.rows).astype(jnp.float32) * wide[:, None]).sum(-1)
    return sum_like(dy, y), sum_like(dweights, weights), _no_gradient(slots)


from_rows.defvjp(lambda y, weights, slots: (from_rows(y, weights, slots), (y, weights, slots)), _from_rows_backward)
