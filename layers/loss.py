"""Cross-entropy over a vocabulary that stays split over devices: no device ever holds all logits of a token.

The logarithm of a softmax needs three numbers of a token that no device knows alone: the largest logit, the sum of
exponentials, and the logit of the target. Each is an all-reduce of one number a token (Shoeybi et al. 2019, section 3).
One token of a vocabulary of four words, two on each of two `tensor` ranks; the target is word 3:

                                rank 0: words 0, 1        rank 1: words 2, 3
    logits                          2      1                  0      3
    1. maximum, all-reduced                 2  ---> 3 <---  3
    logits - maximum               -1     -2                 -3      0
    exp                          .368   .135               .050  1.000
    2. sum of exp, all-reduced           .503  -> 1.553 <-  1.050
    3. target, all-reduced                  0  ---> 0 <---  0        rank 0 does not have word 3 and adds 0
    loss = log(1.553) - 0                       = 0.440

    gradient = exp / 1.553 - [word is the target]
                                 .237   .087               .032  -.356     each rank computes its own, without sending

Read `projected_loss.py` next: the same fused with the product that makes the logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..meshes import DEFAULT_RULES, ShardingRules
from ..meshes.device_axes import block_index, num_manual_blocks
from .check_inputs import check_targets
from .collectives import max_blocks, sum_blocks


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, rules: ShardingRules = DEFAULT_RULES
) -> jax.Array:
    """Return the sum over tokens of weight x negative log-likelihood, a float32 scalar.

    logits[B@data, T, V@tensor], targets[B@data, T], weights[B@data, T] -> []

    Weights that sum to 1 over the whole batch make it the mean; a token of weight 0 is masked. A target outside
    the vocabulary makes loss and gradients NaN, unless it is masked.

    Costs three all-reduces of [B, T] over `tensor` (maximum, normalizer, target logit); the logits are never gathered.

    Raises:
        ModelError: targets or weights are not one for each token, or targets are not integers.
    """
    check_targets(targets_BT, weights_BT, shape=logits_BTV.shape[:-1])
    axes = rules.axes("vocab")
    targets_BT, weights_BT = reject_unknown_targets(
        targets_BT, weights_BT, logits_BTV.shape[-1] * num_manual_blocks(axes)
    )
    return weighted_sum(weights_BT, token_losses(logits_BTV, targets_BT, axes).loss)


class TokenLosses(NamedTuple):
    """The loss of every token [B, T], and the arrays that its gradient is computed from.

    exp(logits - maximum) [B, T, V], its sum over words [B, T], the word ids [B, T, V], and the logarithm of the sum of
    exp(logits) [B, T], log Z.
    """

    loss: jax.Array
    exp: jax.Array
    sums: jax.Array
    word: jax.Array
    log_z: jax.Array


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array, axes: tuple[str, ...]) -> TokenLosses:
    """Compute every token's loss: logits[B, T, V@axes], targets[B, T] -> loss[B, T], the same over `axes`."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # The maximum only keeps exp() in range: its gradient cancels, so none is computed.
    top_BT = max_blocks(jax.lax.stop_gradient(logits_BTV).max(-1), axes)
    shifted_BTV = logits_BTV - top_BT[..., None]
    exp_BTV = jnp.exp(shifted_BTV)
    sums_BT = exp_BTV.sum(-1)
    # A comparison instead of a gather: indexing a split dimension would gather it, or crash the partitioner.
    first = block_index(axes) * logits_BTV.shape[-1]
    word_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + first
    target_BT = jnp.where(word_BTV == targets_BT[..., None], shifted_BTV, 0.0).sum(-1)
    sums_BT, target_BT = sum_blocks((sums_BT, target_BT), axes)
    log_BT = jnp.log(sums_BT)
    return TokenLosses(log_BT - target_BT, exp_BTV, sums_BT, word_BTV, log_BT + top_BT)


def weighted_sum(weights_BT: jax.Array, loss_BT: jax.Array) -> jax.Array:
    """Return the sum of weight x loss in float32, also where jax_enable_x64 lets weights be float64."""
    return (weights_BT.astype(jnp.float32) * loss_BT).sum()


def reject_unknown_targets(targets_BT: jax.Array, weights_BT: jax.Array, num_words: int) -> tuple[jax.Array, jax.Array]:
    """Return targets as int32, and weights that are NaN where a target is not in the vocabulary; a weight of 0 stays 0.

    An error cannot be raised inside a compiled program, and a target that no device has would cost log(sum) unnoticed.
    """
    # Narrow types cannot hold the size of the vocabulary, and wide ones may hold an id that 32 bits would wrap.
    targets_BT = targets_BT if targets_BT.dtype.itemsize > 4 else targets_BT.astype(jnp.int32)
    is_known_BT = (targets_BT >= 0) & (targets_BT < num_words) | (weights_BT == 0)
    return targets_BT.astype(jnp.int32), jnp.where(is_known_BT, weights_BT, jnp.nan)
