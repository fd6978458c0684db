"""Cross-entropy fused with the projection that makes the logits, a chunk of tokens at a time.

The logits of a microbatch are often its largest array, 4 bytes for every token and word: 1.6 GB for 8,192 tokens and
GPT-2's 50,257 words. Here only a chunk's exist at once, 206 MB for 1,024 tokens, and none is computed twice: a chunk
turns its logits into gradients on the spot, in the forward.

    x[B, T, D]  --cut along T-->  [chunks, B, t, D]                  a `lax.scan` over chunks:

        logits[B, t, V]  =  x @ table^T                               matmul 1
        error [B, t, V]  =  weight * (softmax(logits) - one_hot(target))      see `loss.py`
        grad of x        =  error @ table            [B, t, D]        matmul 2, an output of the scan
        grad of table   +=  error^T @ x              [V, D]           matmul 3, added up in the carry, in float32

    after it, once:  all-reduce of grad of x over `tensor` (each rank has summed over its words alone)
                     all-reduce of grad of table over `data` (each rank has summed over its sequences alone)

The backward only scales both gradients by the gradient that arrives, which is a number. They wait for it from the
forward on: D numbers for every token and for every word.

A z-loss c (log Z)^2 of every token, with Z = sum over words of exp(logit), keeps the logits small (Chowdhery et al.
2022, "PaLM", section 5). Its gradient is 2 c log Z softmax, so the softmax above is taken 1 + 2 c log Z times.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..meshes import DEFAULT_RULES, ShardingRules
from ..meshes.device_axes import mark_varying, num_manual_blocks, sum_like, varying_axes
from .check_inputs import check_features, check_targets
from .collectives import gather_tokens, leave_split, max_blocks, run_in_blocks
from .loss import TokenLosses, reject_unknown_targets, token_losses, weighted_sum
from .options.logits import PLAIN_LOGITS, LogitShape

CHUNK_TOKENS = 1024
"""Most tokens of a chunk for x of no more features than this; shared evenly, a chunk may have up to half fewer.

A chunk adds to the table's gradient: 8 bytes read and written for every number, and 2 flops for each token. With fewer
tokens than this a GPU would wait for its memory (an H200 does 206 flops in the time that it reads a byte)."""


def projected_cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    rules: ShardingRules = DEFAULT_RULES,
    shape: LogitShape = PLAIN_LOGITS,
) -> jax.Array:
    """Return `cross_entropy` of the logits x @ table^T, of a `shape`, without ever holding the logits of all tokens.

    x[B@data, T, D] in the compute dtype, table[V@tensor, D], targets[B@data, T], weights[B@data, T] -> []; where the
    rules split `stream_tokens`, inside `shard_map` x has this device's tokens, and targets and weights all.

    Differentiated, it takes three matmuls in all, as without chunks. A chunk has at most as many tokens as x has
    features, so that its logits take as much memory as the table's gradient, or `CHUNK_TOKENS` if that is more; tokens
    are shared evenly. Costs the all-reduces of `cross_entropy` chunk by chunk, and one of each gradient at the end.

    >>> x, table = jnp.ones((2, 16, 64)), jnp.ones((256, 64))
    >>> float(projected_cross_entropy(x, table, jnp.zeros((2, 16), int), jnp.full((2, 16), 1 / 32)))
    5.545...

    Raises:
        ModelError: targets or weights are not one for each token, targets are not integers, or x and the table differ
            in their number of features.
        ShardingError: B does not split evenly over `data`, or V over its axes.
    """
    return projected_losses(x_BTD, table_VD, targets_BT, weights_BT, rules=rules, shape=shape).loss


class ProjectedLosses(NamedTuple):
    """The loss that is trained on, [], and the part of it that the z-loss is, [] without gradient, None without one."""

    loss: jax.Array
    z_loss: jax.Array | None


def projected_losses(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    rules: ShardingRules = DEFAULT_RULES,
    shape: LogitShape = PLAIN_LOGITS,
) -> ProjectedLosses:
    """Return `projected_cross_entropy` plus the sum over tokens of weight x `z_loss` x (log Z)^2.

    Shapes, errors and cost are those of `projected_cross_entropy`.
    """
    check_features(x_BTD, table_VD.shape[-1], layer="the head's table")
    axes = _How(vocab=rules.axes("vocab"), tokens=rules.token_axes, shape=shape, z_loss=z_loss)
    check_targets(targets_BT, weights_BT, shape=(x_BTD.shape[0], x_BTD.shape[1] * num_manual_blocks(axes.tokens)))
    rules.check_in_context(("vocab", "embed"), shape=table_VD.shape, name="the head's table")
    rules.check_in_context(of_x := ("batch", "stream_tokens", "embed"), shape=x_BTD.shape, name="x")

    def sum_losses(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
        words = shape.words or table_VD.shape[0] * num_manual_blocks(axes.vocab)
        return tuple(_project(x_BTD, table_VD, *reject_unknown_targets(targets_BT, weights_BT, words), axes))

    # In blocks, so that gradients are summed once: left to the compiler, the table's would be in every chunk.
    in_dims = (of_x, ("vocab", "embed"), ("batch", "tokens"), ("batch", "tokens"))
    out_dims = ((), () if z_loss else None)
    run = run_in_blocks(sum_losses, rules=rules, in_dims=in_dims, out_dims=out_dims)
    loss, of_z = run(x_BTD, table_VD, targets_BT, weights_BT)
    return ProjectedLosses(loss, jax.lax.stop_gradient(of_z))


class TokenScores(NamedTuple):
    """The log-likelihood of every target, and whether it is the likeliest word, the first of equal ones; [B, T]."""

    logprob: jax.Array
    is_best: jax.Array


def projected_scores(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    rules: ShardingRules = DEFAULT_RULES,
    shape: LogitShape = PLAIN_LOGITS,
) -> TokenScores:
    """Return the scores of targets by the logits x @ table^T, chunk by chunk: float32 and bool [B, T].

    Shapes and errors are those of `projected_cross_entropy`; costs one more all-reduce of [B, T] over `vocab`. A target
    outside the vocabulary has no score.
    """
    check_features(x_BTD, table_VD.shape[-1], layer="the head's table")
    axes = _How(vocab=rules.axes("vocab"), tokens=rules.token_axes, shape=shape, z_loss=0.0)

    def score(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole_BTD, table_VD = gather_tokens(x_BTD, axes.tokens), table_VD.astype(x_BTD.dtype)

        def chunk(carry: None, part: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x_BtD, targets_Bt = part
            logits_BtV = _logits(x_BtD, table_VD, axes)
            losses = token_losses(logits_BtV, targets_Bt, axes.vocab)
            top_Bt = max_blocks(logits_BtV.max(-1), axes.vocab)
            # The least word with the largest logit, as the largest of negative ones.
            is_top_BtV = logits_BtV == top_Bt[..., None]
            least_Bt = max_blocks(jnp.where(is_top_BtV, -losses.word, jnp.iinfo(jnp.int32).min).max(-1), axes.vocab)
            return carry, (-losses.loss, -least_Bt == targets_Bt)

        parts = _scan(chunk, None, _cut_tokens(whole_BTD, targets_BT))[1]
        logprob_BT, is_best_BT = (_merge_tokens(part, targets_BT.shape[1]) for part in parts)
        return logprob_BT, is_best_BT

    of_x, of_tokens = ("batch", "stream_tokens", "embed"), ("batch", "tokens")
    run = run_in_blocks(
        score, rules=rules, in_dims=(of_x, ("vocab", "embed"), of_tokens), out_dims=(of_tokens, of_tokens)
    )
    return TokenScores(*run(x_BTD, table_VD, targets_BT))


class _How(NamedTuple):
    """The mesh axes that split the vocabulary, and those of them that split the tokens of x; what is made of logits."""

    vocab: tuple[str, ...]
    tokens: tuple[str, ...]
    shape: LogitShape
    z_loss: float


# The gradient is written by hand since autodiff would either keep all logits or compute them again.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _project(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, axes: _How
) -> ProjectedLosses:
    return _sum_chunks(gather_tokens(x_BTD, axes.tokens), table_VD, targets_BT, weights_BT, how=axes)


class _Grads(NamedTuple):
    """The gradients of the loss: of x [B, T, D], of the table [V, D], of the weights [B, T]."""

    x: Any
    table: Any
    weights: Any


def _project_forward(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, axes: _How
) -> tuple[ProjectedLosses, Any]:
    whole_BTD = gather_tokens(x_BTD, axes.tokens)
    losses, grads = _differentiate_chunks(whole_BTD, table_VD, targets_BT, weights_BT, how=axes)
    # One sum after the loop, in the compute dtype, as every other gradient of an activation.
    over = tuple(axis for axis in axes.vocab if axis in axes.tokens or axis not in varying_axes(x_BTD))
    grads = grads._replace(x=leave_split(grads.x, over, tokens=axes.tokens))
    return losses, (grads, x_BTD, table_VD, targets_BT, weights_BT)


def _project_backward(_: _How, saved: Any, given: ProjectedLosses) -> tuple[Any, ...]:
    grads, x_BTD, table_VD, targets_BT, weights_BT = saved
    grad = given.loss
    return (
        _return_to(x_BTD, grads.x * grad.astype(x_BTD.dtype)),
        _return_to(table_VD, grads.table * grad),
        np.zeros(targets_BT.shape, jax.dtypes.float0),
        _return_to(weights_BT, grads.weights * grad),
    )


_project.defvjp(_project_forward, _project_backward)


def _sum_chunks(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, how: _How
) -> ProjectedLosses:
    """Compute the losses chunk by chunk: x[B, T, D], table[V@axes, D] -> []."""
    table_VD = table_VD.astype(x_BTD.dtype)

    def chunk(sums: ProjectedLosses, part: tuple[jax.Array, ...]) -> tuple[ProjectedLosses, None]:
        x_BtD, targets_Bt, weights_Bt = part
        losses = token_losses(_logits(x_BtD, table_VD, how), targets_Bt, how.vocab)
        return _add(sums, _losses_of(losses, how), weights_Bt), None

    start = _zero_sums(x_BTD, targets_BT, weights_BT, how=how)
    return _scan(chunk, start, _cut_tokens(x_BTD, targets_BT, weights_BT))[0]


def _differentiate_chunks(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, how: _How
) -> tuple[ProjectedLosses, _Grads]:
    """Compute the losses chunk by chunk, and gradients: the table's in float32, that of x not summed over `axes`."""
    cast_VD = table_VD.astype(x_BTD.dtype)

    def chunk(sums: tuple[ProjectedLosses, jax.Array], part: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x_BtD, targets_Bt, weights_Bt = part
        logits_BtV = _logits(x_BtD, cast_VD, how)
        losses = token_losses(logits_BtV, targets_Bt, how.vocab)
        error_BtV = how.shape.return_grad(_grad_of_logits(losses, targets_Bt, how), logits_BtV)
        # In the compute dtype, as every other gradient of an activation: matmuls 2 and 3 run at its speed.
        error_BtV = (weights_Bt[..., None] * error_BtV).astype(x_BtD.dtype)
        # Tokens merged into one dim, as in product.py: XLA's CPU backend would transpose the activation first.
        error_nV, x_nD = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (error_BtV, x_BtD))
        grad_VD = jnp.einsum("nv,nd->vd", error_nV, x_nD, preferred_element_type=jnp.float32)
        grad_BtD = jnp.einsum("btv,vd->btd", error_BtV, cast_VD, preferred_element_type=jnp.float32)
        own = _losses_of(losses, how)
        return (_add(sums[0], own, weights_Bt), sums[1] + grad_VD), (grad_BtD, own.loss)

    # The carry of a scan keeps its type, so sums start with the marks that they end with.
    shared = varying_axes(x_BTD, targets_BT, weights_BT)
    start = (
        _zero_sums(x_BTD, targets_BT, weights_BT, how=how),
        mark_varying(jnp.zeros(table_VD.shape, jnp.float32), (*shared, *varying_axes(table_VD))),
    )
    (sums, grad_VD), parts = _scan(chunk, start, _cut_tokens(x_BTD, targets_BT, weights_BT))
    grad_BTD, loss_BT = (_merge_tokens(part, x_BTD.shape[1]) for part in parts)
    return sums, _Grads(grad_BTD.astype(x_BTD.dtype), grad_VD, loss_BT)


def _losses_of(losses: TokenLosses, how: _How) -> ProjectedLosses:
    """Return the loss of every token [B, T], and the part of it that the z-loss is."""
    if not how.z_loss:
        return ProjectedLosses(losses.loss, None)
    z_BT = how.z_loss * jnp.square(losses.log_z)
    return ProjectedLosses(losses.loss + z_BT, z_BT)


def _grad_of_logits(losses: TokenLosses, targets_BT: jax.Array, how: _How) -> jax.Array:
    """Return the gradients of tokens' losses by their logits: softmax - one-hot of the target, see `loss.py`."""
    softmax_BTV = losses.exp / losses.sums[..., None]
    if how.z_loss:
        softmax_BTV = softmax_BTV * (1 + 2 * how.z_loss * losses.log_z)[..., None]
    return softmax_BTV - (losses.word == targets_BT[..., None]).astype(jnp.float32)


def _zero_sums(*arrays: jax.Array, how: _How) -> ProjectedLosses:
    """Return sums of 0, which vary over the axes over which the arrays do, but for those of the vocabulary."""
    zero = mark_varying(jnp.zeros((), jnp.float32), varying_axes(*arrays, without=how.vocab))
    return ProjectedLosses(zero, zero if how.z_loss else None)


def _add(sums: ProjectedLosses, parts: ProjectedLosses, weights_BT: jax.Array) -> ProjectedLosses:
    return jax.tree.map(lambda own, part: own + weighted_sum(weights_BT, part), sums, parts)


def _logits(x_BTD: jax.Array, table_VD: jax.Array, how: _How) -> jax.Array:
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)
    return how.shape.apply(logits_BTV, how.vocab)


def _scan(chunk: Any, start: Any, parts: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    if len(parts[0]) > 1:
        return jax.lax.scan(chunk, start, parts)
    carry, out = chunk(start, tuple(part[0] for part in parts))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


def chunk_tokens(width: int) -> int:
    """Return the most tokens whose logits exist at once, for x of `width` features."""
    return max(width, CHUNK_TOKENS)


def _cut_tokens(x_BTD: jax.Array, *rest_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cut arrays along tokens, [B, T, ...] -> [chunks, B, t, ...]; tokens of weight 0 fill up the last chunk."""
    num_sequences, num_tokens, width = x_BTD.shape
    num_chunks = max(1, min(math.ceil(num_sequences * num_tokens / chunk_tokens(width)), num_tokens))
    size = math.ceil(num_tokens / num_chunks)
    missing = num_chunks * size - num_tokens

    def cut(leaf: jax.Array) -> jax.Array:
        if missing:
            leaf = jnp.pad(leaf, [(0, 0), (0, missing), *[(0, 0)] * (leaf.ndim - 2)])
        return jnp.moveaxis(leaf.reshape(num_sequences, num_chunks, size, *leaf.shape[2:]), 1, 0)

    return tuple(map(cut, (x_BTD, *rest_BT)))


def _merge_tokens(leaf: jax.Array, num_tokens: int) -> jax.Array:
    """Undo `_cut_tokens`: [chunks, B, t, ...] -> [B, T, ...]."""
    joined = jnp.moveaxis(leaf, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :num_tokens]


def _return_to(primal: jax.Array, grad: jax.Array) -> jax.Array:
    """Return a gradient in the type of its primal: summed over the axes that it lacks, in its dtype."""
    return sum_like(grad, primal).astype(primal.dtype)
