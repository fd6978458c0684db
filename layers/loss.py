"""Cross-entropy over a vocabulary that stays split, and the same fused with the projection that makes the logits.

The logits of a microbatch are the largest array of a small model and a large one's largest outside its layers: 4 bytes
for every token and word. `projected_cross_entropy` makes them for a chunk of tokens at a time and turns them into
gradients on the spot, so that no more than a chunk's exist at once and none is computed twice.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ..meshes import DEFAULT_RULES, ShardingRules
from .check import check_features, check_targets
from .linear import spread

CHUNK_TOKENS = 1024
"""Tokens that chunks are cut for at least; shared evenly, one has more than half of them. Adding to the table's
gradient moves 8 bytes a number for 2 flops a token: with fewer tokens than this a GPU's memory would hold up its matrix
units (an H200 does 206 flops in the time of a byte)."""


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, rules: ShardingRules = DEFAULT_RULES
) -> jax.Array:
    """Return the sum over tokens of weight x negative log-likelihood, a float32 scalar.

    logits[B@data, T, V@tensor], targets[B@data, T], weights[B@data, T] -> []

    Weights that sum to 1 over the whole batch make it the mean; a token of weight 0 is masked. A target outside of the
    vocabulary makes loss and gradients NaN, unless it is masked. Costs three all-reduces
    of [B, T] over `tensor` (maximum, normaliser, target logit); the logits are never gathered. Where an axis of the
    vocabulary is manual, the logits are this device's block of it and the same is summed over that axis too.

    Raises:
        ModelError: targets or weights are not one for each token, or targets are no integers.
    """
    check_targets(targets_BT, weights_BT, shape=logits_BTV.shape[:-1])
    axes = rules.manual_axes("vocab")
    targets_BT, weights_BT = _spoil_unknown(targets_BT, weights_BT, logits_BTV.shape[-1], axes)
    return _weigh(weights_BT, _compare(logits_BTV, targets_BT, axes).loss)


def projected_cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    rules: ShardingRules = DEFAULT_RULES,
) -> jax.Array:
    """Return `cross_entropy` of the logits x @ table^T, without ever holding the logits of all tokens.

    x[B@data, T, D] in the compute dtype, table[V@tensor, D], targets[B@data, T], weights[B@data, T] -> []

    Under differentiation a chunk's logits become gradients of x and of the table at once: three matmuls in all, as
    without chunks. A chunk has as many tokens as x has features, so that its logits weigh what the table's gradient
    does, or `CHUNK_TOKENS` if that is more; tokens are then shared evenly. Costs the all-reduces of `cross_entropy`,
    chunk by chunk, and one of x's gradient.

    >>> x, table = jnp.ones((2, 16, 64)), jnp.ones((256, 64))
    >>> float(projected_cross_entropy(x, table, jnp.zeros((2, 16), int), jnp.full((2, 16), 1 / 32)))
    5.545...

    Raises:
        ModelError: targets or weights are not one for each token, targets are no integers, or x and the table have
            other numbers of features.
        ShardingError: B does not split over `data`, or V over its axes.
    """
    check_features(x_BTD, table_VD.shape[-1], layer="the head's table")
    check_targets(targets_BT, weights_BT, shape=x_BTD.shape[:-1])
    rules.check_in_context(("vocab", "embed"), shape=table_VD.shape, name="the head's table")
    rules.check_in_context(("batch", "tokens", "embed"), shape=x_BTD.shape, name="x")
    manual = rules.manual_axes("vocab")
    targets_BT, weights_BT = _spoil_unknown(targets_BT, weights_BT, table_VD.shape[0], manual)
    return _project(x_BTD, table_VD, targets_BT, weights_BT, rules)


def _spoil_unknown(
    targets_BT: jax.Array, weights_BT: jax.Array, num_words: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return targets as int32, and weights that are NaN where a target is no word; a weight of 0 stays 0.

    Args:
        num_words: of this device's block, over manual `axes`.
    """
    num_words *= jax.lax.axis_size(axes) if axes else 1
    targets_BT = targets_BT if targets_BT.dtype.itemsize > 4 else targets_BT.astype(jnp.int32)
    is_fine_BT = (targets_BT >= 0) & (targets_BT < num_words) | (weights_BT == 0)
    return targets_BT.astype(jnp.int32), jnp.where(is_fine_BT, weights_BT, jnp.nan)


class _Compared(NamedTuple):
    """Losses of tokens [B, T], and what their gradient is made of.

    exp(logits - top) [B, T, V], its sum over words [B, T], the word ids [B, T, V].
    """

    loss: jax.Array
    exp: jax.Array
    sums: jax.Array
    word: jax.Array


def _weigh(weights_BT: jax.Array, loss_BT: jax.Array) -> jax.Array:
    """The weighted sum in float32, also where jax_enable_x64 lets weights be float64."""
    return (weights_BT.astype(jnp.float32) * loss_BT).sum()


def _compare(logits_BTV: jax.Array, targets_BT: jax.Array, axes: tuple[str, ...]) -> _Compared:
    """Compare logits with targets; over manual `axes` the logits are this device's block of words."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # The maximum only keeps exp() in range: its gradient cancels, so none is computed.
    top_BT = jax.lax.stop_gradient(logits_BTV).max(-1)
    top_BT = jax.lax.pmax(top_BT, axes) if axes else top_BT
    shifted_BTV = logits_BTV - top_BT[..., None]
    exp_BTV = jnp.exp(shifted_BTV)
    sums_BT = exp_BTV.sum(-1)
    # A comparison instead of a gather: indexing a split dimension would gather it, or crash the partitioner.
    first = jax.lax.axis_index(axes) * logits_BTV.shape[-1] if axes else 0
    word_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + first
    target_BT = jnp.where(word_BTV == targets_BT[..., None], shifted_BTV, 0.0).sum(-1)
    if axes:
        sums_BT, target_BT = jax.lax.psum((sums_BT, target_BT), axes)
    return _Compared(jnp.log(sums_BT) - target_BT, exp_BTV, sums_BT, word_BTV)


# The gradient is written by hand since autodiff would either keep all logits or compute them again.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _project(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, rules: ShardingRules
) -> jax.Array:
    batch, axes = rules.auto_axes("batch"), _vocab_axes(rules)

    def block(*args: jax.Array) -> jax.Array:
        loss = _sum_chunks(*args, axes=axes)
        return jax.lax.psum(loss, batch) if batch else loss

    return _in_blocks(block, P(), rules)(x_BTD, table_VD, targets_BT, weights_BT)


class _Grads(NamedTuple):
    """The loss of a block, and its gradients: of x [B, T, D], of the table [V, D], of the weights [B, T]."""

    loss: Any
    x: Any
    table: Any
    weights: Any


def _project_forward(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, rules: ShardingRules
) -> tuple[jax.Array, Any]:
    batch, axes = rules.auto_axes("batch"), _vocab_axes(rules)

    def block(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> _Grads:
        grads = _differentiate_chunks(x_BTD, table_VD, targets_BT, weights_BT, axes=axes)
        if not batch:
            return grads
        loss, table_VD = jax.lax.psum((grads.loss, grads.table), batch)
        return grads._replace(loss=loss, table=table_VD)

    vocab = rules.auto_axes("vocab")
    specs = _Grads(P(), P(batch or None), P(vocab or None), P(batch or None))
    grads = _in_blocks(block, specs, rules)(x_BTD, table_VD, targets_BT, weights_BT)
    return grads.loss, (grads, x_BTD, table_VD, targets_BT, weights_BT)


def _project_backward(_: ShardingRules, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    grads, x_BTD, table_VD, targets_BT, weights_BT = saved
    return (
        _return_to(x_BTD, grads.x * grad.astype(x_BTD.dtype)),
        _return_to(table_VD, grads.table * grad),
        np.zeros(targets_BT.shape, jax.dtypes.float0),
        _return_to(weights_BT, grads.weights * grad),
    )


_project.defvjp(_project_forward, _project_backward)


def _sum_chunks(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, axes: tuple[str, ...]
) -> jax.Array:
    """The loss of a block whose axes are all manual."""
    table_VD = table_VD.astype(x_BTD.dtype)

    def chunk(loss: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_BtD, targets_Bt, weights_Bt = part
        compared = _compare(_logits(x_BtD, table_VD), targets_Bt, axes)
        return loss + _weigh(weights_Bt, compared.loss), None

    start = spread(jnp.zeros((), jnp.float32), _varying(x_BTD, targets_BT, weights_BT, without=axes))
    return _scan(chunk, start, _cut(x_BTD, targets_BT, weights_BT))[0]


def _differentiate_chunks(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, axes: tuple[str, ...]
) -> _Grads:
    """The loss of a block whose axes are all manual, and its gradients; the table's in float32."""
    cast_VD = table_VD.astype(x_BTD.dtype)

    def chunk(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x_BtD, targets_Bt, weights_Bt = part
        compared = _compare(_logits(x_BtD, cast_VD), targets_Bt, axes)
        share_BtV = compared.exp / compared.sums[..., None]
        error_BtV = share_BtV - (compared.word == targets_Bt[..., None]).astype(jnp.float32)
        # In the compute dtype, as every other gradient of an activation: both matmuls run at its speed.
        error_BtV = (weights_Bt[..., None] * error_BtV).astype(x_BtD.dtype)
        # Over tokens in one dim, as in product.py.
        error_nV, x_nD = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (error_BtV, x_BtD))
        grad_VD = jnp.einsum("nv,nd->vd", error_nV, x_nD, preferred_element_type=jnp.float32)
        grad_BtD = jnp.einsum("btv,vd->btd", error_BtV, cast_VD, preferred_element_type=jnp.float32)
        loss = _weigh(weights_Bt, compared.loss)
        return (sums[0] + loss, sums[1] + grad_VD), (grad_BtD, compared.loss)

    shared = _varying(x_BTD, targets_BT, weights_BT)
    start = (
        spread(jnp.zeros((), jnp.float32), _varying(x_BTD, targets_BT, weights_BT, without=axes)),
        spread(jnp.zeros(table_VD.shape, jnp.float32), (*shared, *_varying(table_VD))),
    )
    (loss, grad_VD), parts = _scan(chunk, start, _cut(x_BTD, targets_BT, weights_BT))
    grad_BTD, loss_BT = (_join(part, x_BTD.shape[1]) for part in parts)
    # In one sum, in float32: XLA's CPU backend aborts on bfloat16 sums over manual axes.
    over = tuple(axis for axis in axes if axis not in _varying(x_BTD))
    grad_BTD = jax.lax.psum(grad_BTD, over) if over else grad_BTD
    return _Grads(loss, grad_BTD.astype(x_BTD.dtype), grad_VD, loss_BT)


def _logits(x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)


def _in_blocks(block: Any, out_specs: Any, rules: ShardingRules) -> Any:
    """Run a block with the axes of batch and vocabulary manual: what is summed is summed once, not once a chunk."""
    batch, vocab = rules.auto_axes("batch"), rules.auto_axes("vocab")
    if not batch and not vocab:
        return block
    tokens = P(batch or None)
    in_specs = (tokens, P(vocab or None), tokens, tokens)
    return jax.shard_map(block, in_specs=in_specs, out_specs=out_specs, axis_names={*batch, *vocab})


def _vocab_axes(rules: ShardingRules) -> tuple[str, ...]:
    """The axes that split the vocabulary inside a block, the outermost first."""
    own = {*rules.auto_axes("vocab"), *rules.manual_axes("vocab")}
    return tuple(axis for axis in rules.axes("vocab") if axis in own)


def _scan(chunk: Any, start: Any, parts: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    if len(parts[0]) > 1:
        return jax.lax.scan(chunk, start, parts)
    carry, out = chunk(start, tuple(part[0] for part in parts))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


def chunk_tokens(width: int) -> int:
    """Return of how many tokens logits exist at once, or all if there are fewer, for x of `width` features."""
    return max(width, CHUNK_TOKENS)


def _cut(x_BTD: jax.Array, *rest_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cut all along tokens into [chunks, B, t, ...]; missing tokens at the end are zero, and so weigh nothing."""
    num_sequences, num_tokens, width = x_BTD.shape
    num_chunks = max(1, min(math.ceil(num_sequences * num_tokens / chunk_tokens(width)), num_tokens))
    size = math.ceil(num_tokens / num_chunks)
    missing = num_chunks * size - num_tokens

    def cut(leaf: jax.Array) -> jax.Array:
        if missing:
            leaf = jnp.pad(leaf, [(0, 0), (0, missing), *[(0, 0)] * (leaf.ndim - 2)])
        return jnp.moveaxis(leaf.reshape(num_sequences, num_chunks, size, *leaf.shape[2:]), 1, 0)

    return tuple(map(cut, (x_BTD, *rest_BT)))


def _join(leaf: jax.Array, num_tokens: int) -> jax.Array:
    """Undo `_cut`."""
    joined = jnp.moveaxis(leaf, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :num_tokens]


def _varying(*args: jax.Array, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The manual axes over which any of these differs."""
    return tuple({axis: None for arg in args for axis in jax.typeof(arg).mat.varying if axis not in without})


def _return_to(primal: jax.Array, grad: jax.Array) -> jax.Array:
    """Return a gradient in the type of what it belongs to: its dtype, and the same on the same manual axes."""
    axes = tuple(axis for axis in _varying(grad) if axis not in _varying(primal))
    return (jax.lax.psum(grad, axes) if axes else grad).astype(primal.dtype)
