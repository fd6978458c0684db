"""Causal attention of whole sequences by some of the heads: tokens are exchanged for heads ("Ulysses").

    q [B, T/c, N, H]  --all-to-all over context-->  [B, T, N/c, H]  attention as on one device  --all-to-all-->  back

As Jacobs et al. 2023, section 3.1. It sends all heads of queries and outputs, but of keys and values a part to each
rank, where `gathered.py` sends all to all: less where there are many ranks, or as many key/value heads as query heads.
Read `choice.py` for the arithmetic.
"""

from typing import Any

import jax

from ..attention.flash import attend_causally
from ..collectives import own_columns
from ..config import ModelConfig
from .places import order_chunks, restore_order


def attend_exchanged(
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    *,
    config: ModelConfig,
    axes: tuple[str, ...],
    segments_Bt: jax.Array | None = None,
    is_windowed: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention over whole sequences, of which each device has two chunks.

    q[B, T@context, N, H], k and v[B, T@context, K, H], segments[B, T@context] -> mixed[B, T@context, N, H], for use
    inside `shard_map`. N and K must divide by the ranks. Sends an all-to-all of each of q, k, v and mixed, and as much
    backward. Of sinks [N] a device takes those of its heads.
    """
    num_ranks = jax.lax.axis_size(axes)

    def to_heads(leaf: jax.Array) -> jax.Array:
        whole = jax.lax.all_to_all(leaf, axes, split_axis=2, concat_axis=1, tiled=True)
        return restore_order(whole, num_ranks=num_ranks, dim=1)

    def to_tokens(leaf: jax.Array) -> jax.Array:
        ordered = order_chunks(leaf, num_ranks=num_ranks, dim=1)
        return jax.lax.all_to_all(ordered, axes, split_axis=1, concat_axis=2, tiled=True)

    segments_BT = None
    if segments_Bt is not None:
        gathered = jax.lax.all_gather(segments_Bt, axes, axis=1, tiled=True)
        segments_BT = restore_order(gathered, num_ranks=num_ranks, dim=1)
    q_BTnH, k_BTkH, v_BTkH = map(to_heads, (q_BtNH, k_BtKH, v_BtKH))
    sinks_n = None if sinks_N is None else own_columns(sinks_N, axes, unit=1)
    more: dict[str, Any] = {"segments_BT": segments_BT, "is_windowed": is_windowed, "sinks_N": sinks_n}
    return to_tokens(attend_causally(q_BTnH, k_BTkH, v_BTkH, config=config, **more))
