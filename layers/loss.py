"""Cross-entropy over a vocabulary that stays split: what crosses the network is a few numbers per token."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Return the sum over tokens of weight x negative log-likelihood, a float32 scalar.

    logits[B@data, T, V@tensor], targets[B@data, T], weights[B@data, T] -> []

    Weights that sum to 1 over the whole batch make it the mean; a token of weight 0 is masked. Costs three all-reduces
    of [B, T] over `tensor` (maximum, normaliser, target logit); the logits are never gathered.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    # The maximum only keeps exp() in range: its gradient cancels, so none is computed.
    top_BT = jax.lax.stop_gradient(logits_BTV.max(-1))
    shifted_BTV = logits_BTV - top_BT[..., None]
    normalizer_BT = jnp.log(jnp.exp(shifted_BTV).sum(-1))
    # A comparison instead of a gather: indexing a split dimension would gather it, or crash the partitioner.
    vocab_V = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    target_BT = jnp.where(vocab_V == targets_BT[..., None], shifted_BTV, 0.0).sum(-1)
    return (weights_BT * (normalizer_BT - target_BT)).sum()
