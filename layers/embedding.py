"""Token embedding with its vocabulary split over `tensor` (Shoeybi et al. 2019, section 3), and learned positions."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ..meshes import DEFAULT_RULES, ShardingRules
from ..meshes.device_axes import block_index, manual_axes, num_manual_blocks
from .check_inputs import check_token_ids
from .collectives import leave_split, own_tokens, run_in_blocks
from .config import ModelConfig
from .context.places import own_positions
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
        words = self.config.vocab_size
        x_BTD = lookup(self.table[...], tokens_BT, num_words=words, dtype=self.config.dtype, rules=self.rules)
        if self.config.embedding_scale != 1:
            # Rounded to the compute dtype, as in transformers: Gemma was trained so.
            x_BTD = x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        if self.positions is not None:
            table_PD = self.positions[...]
            if positions_BT is None and manual_axes(context := self.rules.axes("tokens")):
                positions_BT = own_positions(tokens_BT.shape[1], context)[None]
            rows_BTD = table_PD[None, : tokens_BT.shape[1]] if positions_BT is None else table_PD[positions_BT]
            x_BTD = x_BTD.astype(jnp.float32) + own_tokens(rows_BTD, self.rules.token_axes)
        return self.rules.constrain(x_BTD.astype(self.config.dtype), ("batch", "stream_tokens", "embed"))


def lookup(
    table_VD: jax.Array,
    tokens_BT: jax.Array,
    *,
    num_words: int | None = None,
    dtype: DTypeLike = jnp.float32,
    rules: ShardingRules = DEFAULT_RULES,
) -> jax.Array:
    """Return the rows of a table whose vocabulary is split, without gathering the table.

    table[V@tensor, D], tokens[B@data, T] -> rows[B@data, T, D] in `dtype`; one all-reduce over `tensor`, in `dtype`.

    Each device looks up the tokens of its own block of words and contributes zeros for the others:

        tokens 1, 6          rank 0: words 0-3    rank 1: words 4-7
        index in the block      1, -                 -, 2
        rows                  [w1, 0]       +      [0, w6]       = [w1, w6]

    An id outside the vocabulary gets a row of NaN: the gather would clamp it to another word's row, a different one on
    each mesh.

    Args:
        num_words: size of the vocabulary, behind which the table has padding; all rows if left out.

    Raises:
        ShardingError: V does not split evenly over its axes, or B over `data`.
    """
    rules.check_in_context(("vocab", "embed"), shape=table_VD.shape, name="the embedding table")
    rules.check_in_context(("batch", "tokens"), shape=tokens_BT.shape, name="tokens")
    own = partial(_lookup_block, num_words=num_words, rules=rules, dtype=dtype)
    # In blocks for the gradient: the compiler's scatter makes that of the whole table on every device, and sums it.
    in_dims, out_dims = (("vocab", "embed"), ("batch", "tokens")), ("batch", "stream_tokens", "embed")
    return run_in_blocks(own, rules=rules, in_dims=in_dims, out_dims=out_dims)(table_VD, tokens_BT)


def _lookup_block(
    table_VD: jax.Array, tokens_BT: jax.Array, *, num_words: int | None, rules: ShardingRules, dtype: DTypeLike
) -> jax.Array:
    block, axes = table_VD.shape[0], rules.axes("vocab")
    num_words = block * num_manual_blocks(axes) if num_words is None else num_words
    # Narrow types cannot hold the size of the vocabulary, and wide ones may hold an id that 32 bits would wrap.
    tokens_BT = tokens_BT if tokens_BT.dtype.itemsize > 4 else tokens_BT.astype(jnp.int32)
    is_word_BT = (tokens_BT >= 0) & (tokens_BT < num_words)
    local_BT = jnp.where(is_word_BT, tokens_BT, 0).astype(jnp.int32) - block_index(axes) * block
    is_own_BT = (local_BT >= 0) & (local_BT < block)
    rows_BTD = table_VD[jnp.where(is_own_BT, local_BT, 0)]
    # Rounded before the sum, which has one term besides zeros for each token: the result is the same.
    rows_BTD = jnp.where(is_own_BT[..., None], rows_BTD, 0.0).astype(dtype)
    return leave_split(jnp.where(is_word_BT[..., None], rows_BTD, jnp.nan), axes, tokens=rules.token_axes)
