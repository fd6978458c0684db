"""Cross-entropy over a vocabulary that stays split: what crosses the network is a few numbers per token."""

import jax
import jax.numpy as jnp

from ..meshes import DEFAULT_RULES, ShardingRules


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, rules: ShardingRules = DEFAULT_RULES
) -> jax.Array:
    """Return the sum over tokens of weight x negative log-likelihood, a float32 scalar.

    logits[B@data, T, V@tensor], targets[B@data, T], weights[B@data, T] -> []

    Weights that sum to 1 over the whole batch make it the mean; a token of weight 0 is masked. Costs three all-reduces
    of [B, T] over `tensor` (maximum, normaliser, target logit); the logits are never gathered. Where an axis of the
    vocabulary is manual, the logits are this device's block of it and the same is summed over that axis too.
    """
    axes = rules.manual_axes("vocab")
    logits_BTV = logits_BTV.astype(jnp.float32)
    # The maximum only keeps exp() in range: its gradient cancels, so none is computed.
    top_BT = jax.lax.stop_gradient(logits_BTV).max(-1)
    top_BT = jax.lax.pmax(top_BT, axes) if axes else top_BT
    shifted_BTV = logits_BTV - top_BT[..., None]
    sums_BT = jnp.exp(shifted_BTV).sum(-1)
    # A comparison instead of a gather: indexing a split dimension would gather it, or crash the partitioner.
    first = jax.lax.axis_index(axes) * logits_BTV.shape[-1] if axes else 0
    vocab_V = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + first
    target_BT = jnp.where(vocab_V == targets_BT[..., None], shifted_BTV, 0.0).sum(-1)
    if axes:
        sums_BT, target_BT = jax.lax.psum((sums_BT, target_BT), axes)
    return (weights_BT * (jnp.log(sums_BT) - target_BT)).sum()
