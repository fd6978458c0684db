"""Token embedding with its vocabulary split over `tensor` (Shoeybi et al. 2019, section 3), and learned positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ..meshes import DEFAULT_RULES, ShardingRules
from .check_inputs import check_token_ids
from .config import ModelConfig
from .partitioning import INIT_STD, make_param


class Embedding(nnx.Module):
    """Rows of a vocabulary-parallel table, plus rows of a position table where positions are learned.

    tokens[B@data, T] -> x[B@data, T, D] from table[V@tensor, D]; one all-reduce of x over `tensor` forward.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        d = config.hidden_size
        self.table = make_param(rngs.params(), (config.vocab_size, d), ("vocab", "embed"), std=INIT_STD, rules=rules)
        learned = config.positions == "learned"
        # Drawn in either case: every draw advances the stream, so that later parameters do not depend on this choice.
        positions = make_param(rngs.params(), (config.max_tokens, d), ("positions", "embed"), std=INIT_STD, rules=rules)
        self.positions = positions if learned else nnx.data(None)

    def __call__(self, tokens_BT: jax.Array, *, positions_BT: jax.Array | None = None) -> jax.Array:
        """tokens[B@data, T] -> x[B@data, T, D] in the compute dtype.

        The row of an id outside the vocabulary is NaN, on every mesh.

        Args:
            positions_BT: position of every token in its sequence; 0 to T - 1 if left out.

        Raises:
            ModelError: tokens are not integers [B, T], or there are more of them than learned positions.
            ShardingError: B does not split evenly over `data`, or V over its axes.
        """
        limit = self.config.max_tokens if self.positions is not None and positions_BT is None else None
        check_token_ids(tokens_BT, max_tokens=limit)
        x_BTD = lookup(self.table[...], tokens_BT, rules=self.rules)
        if self.positions is not None:
            table_PD = self.positions[...]
            rows_BTD = table_PD[None, : tokens_BT.shape[1]] if positions_BT is None else table_PD[positions_BT]
            x_BTD = x_BTD + rows_BTD
        return self.rules.constrain(x_BTD.astype(self.config.dtype), ("batch", "tokens", "embed"))


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, *, rules: ShardingRules = DEFAULT_RULES) -> jax.Array:
    """Return the rows of a table whose vocabulary is split, without gathering the table.

    table[V@tensor, D], tokens[B@data, T] -> rows[B@data, T, D]; one all-reduce over `tensor`.

    Each device looks up the tokens of its own block of words and contributes zeros for the others:

        tokens 1, 6          rank 0: words 0-3    rank 1: words 4-7
        index in the block      1, -                 -, 2
        rows                  [w1, 0]       +      [0, w6]       = [w1, w6]

    Where an axis of the vocabulary is manual, the table is this device's block and the rows are summed over that axis
    too. An id outside the vocabulary gets a row of NaN: the gather would clamp it to another word's row, a different
    one on each mesh.

    Raises:
        ShardingError: V does not split evenly over its axes, or B over `data`.
    """
    rules.check_in_context(("vocab", "embed"), shape=table_VD.shape, name="the embedding table")
    rules.check_in_context(("batch", "tokens"), shape=tokens_BT.shape, name="tokens")
    auto, manual = rules.auto_axes("vocab"), rules.manual_axes("vocab")
    # Narrow types cannot hold the size of the vocabulary, and wide ones may hold an id that 32 bits would wrap.
    tokens_BT = tokens_BT if tokens_BT.dtype.itemsize > 4 else tokens_BT.astype(jnp.int32)
    num_words = table_VD.shape[0] * (jax.lax.axis_size(manual) if manual else 1)
    is_word_BT = (tokens_BT >= 0) & (tokens_BT < num_words)
    tokens_BT = jnp.where(is_word_BT, tokens_BT, 0).astype(jnp.int32)
    if manual:
        tokens_BT = tokens_BT - jax.lax.axis_index(manual) * table_VD.shape[0]
    if auto:
        rows_BTD = _lookup_split(table_VD, tokens_BT, auto, rules)
    elif manual:
        rows_BTD = _take_own_rows(table_VD, tokens_BT)
    else:
        rows_BTD = table_VD[tokens_BT]
    rows_BTD = jax.lax.psum(rows_BTD, manual) if manual else rows_BTD
    return jnp.where(is_word_BT[..., None], rows_BTD, jnp.nan)


# The axis is made manual because XLA's partitioner crashes on a gather from an automatically split operand inside a
# partly manual region. The gradient is written by hand because autodiff of a nested `shard_map` gives its residuals
# the outer region's manual axes, which does not lower (jax 0.10 to 0.12); delete when it does.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup_split(table_VD: jax.Array, tokens_BT: jax.Array, axes: tuple[str, ...], rules: ShardingRules) -> jax.Array:
    def block(table_vD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        local_BT = tokens_BT - jax.lax.axis_index(axes) * table_vD.shape[0]
        return jax.lax.psum(_take_own_rows(table_vD, local_BT), axes)

    batch = rules.auto_axes("batch")
    manual = {*axes, *batch}
    specs = (P(axes, None), P(batch or None))
    return jax.shard_map(block, in_specs=specs, out_specs=P(batch or None), axis_names=manual)(table_VD, tokens_BT)


def _lookup_forward(
    table_VD: jax.Array, tokens_BT: jax.Array, axes: tuple[str, ...], rules: ShardingRules
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _lookup_split(table_VD, tokens_BT, axes, rules), (table_VD, tokens_BT)


def _lookup_backward(
    axes: tuple[str, ...], rules: ShardingRules, saved: tuple[jax.Array, ...], grad_BTD: jax.Array
) -> tuple[jax.Array, np.ndarray[tuple[int, ...], np.dtype[np.void]]]:
    def block(table_vD: jax.Array, tokens_BT: jax.Array, grad_BTD: jax.Array) -> jax.Array:
        local_BT = tokens_BT - jax.lax.axis_index(axes) * table_vD.shape[0]
        mine_BT = (local_BT >= 0) & (local_BT < table_vD.shape[0])
        # One past the end is dropped; a negative index would wrap to another token's row.
        row_BT = jnp.where(mine_BT, local_BT, table_vD.shape[0])
        grad_vD = jnp.zeros_like(table_vD).at[row_BT].add(grad_BTD, mode="drop")
        return jax.lax.psum(grad_vD, batch) if batch else grad_vD

    # Manual too where the compiler splits it: left to itself it gathers the whole batch's gradients for the scatter.
    batch = rules.auto_axes("batch")
    manual = {*axes, *batch}
    table_VD, tokens_BT = saved
    specs = (P(axes, None), P(batch or None), P(batch or None))
    split = jax.shard_map(block, in_specs=specs, out_specs=P(axes, None), axis_names=manual)
    return split(table_VD, tokens_BT, grad_BTD), np.zeros(tokens_BT.shape, jax.dtypes.float0)


_lookup_split.defvjp(_lookup_forward, _lookup_backward)


def _take_own_rows(table_vD: jax.Array, local_BT: jax.Array) -> jax.Array:
    """Return the rows of this device's block of words [B, T, D]; zeros for an index outside it, a word of another."""
    mine_BT = (local_BT >= 0) & (local_BT < table_vD.shape[0])
    return jnp.where(mine_BT[..., None], table_vD[jnp.where(mine_BT, local_BT, 0)], 0.0)
