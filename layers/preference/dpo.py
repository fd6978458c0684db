"""Direct preference optimization: which of two answers to a prompt is preferred (Rafailov et al. 2023, equation 7).

Rows of a batch are pairs, chosen before rejected. With the negative log-likelihood of an answer n, and that by a frozen
reference r,

    reward  =  beta (r - n)
    margin  =  reward of chosen - reward of rejected
    loss    =  -log sigmoid(margin)              mean over pairs

The gradient is that of a weighted cross-entropy, whose weights are known once the rows' losses are: beta
sigmoid(-margin) for chosen tokens, and minus that for rejected ones. So the fused loss of `../projected_loss.py` serves
again, and all that is added is one more product with the head's table, for the rows' losses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ...meshes import DEFAULT_RULES, ShardingRules
from ..options.logits import PLAIN_LOGITS, LogitShape
from ..projected_loss import projected_cross_entropy, projected_scores


class PreferenceLoss(NamedTuple):
    """Means over the pairs of the batch, float32 []: loss, margin, and the share of pairs with a margin above 0."""

    loss: jax.Array
    margin: jax.Array
    accuracy: jax.Array


def preference_loss(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    reference_B: jax.Array,
    shares_B: jax.Array,
    beta: float,
    rules: ShardingRules = DEFAULT_RULES,
    shape: LogitShape = PLAIN_LOGITS,
) -> PreferenceLoss:
    """Return the loss of pairs of rows, chosen before rejected, and how far the model tells them apart.

    x[B@data, T, D], table[V@tensor, D], targets and weights [B@data, T], reference and shares [B@data] -> []

    Both rows of a pair are on one device. Costs the sums of `projected_cross_entropy` and those of `projected_scores`.

    Args:
        weights_BT: 1 for a token of the answer, else 0.
        reference_B: loss of each row by the reference.
        shares_B: share of each row's pair in the mean, 1 / pairs of the whole batch.

    Raises:
        ModelError: as `projected_cross_entropy` does.
    """
    x, table = map(jax.lax.stop_gradient, (x_BTD, table_VD))
    logprob_BT = projected_scores(x, table, targets_BT, rules=rules, shape=shape).logprob
    losses_B = -jnp.where(weights_BT > 0, weights_BT * logprob_BT, 0.0).sum(-1)
    found, slope_B = _compare(losses_B, reference_B, shares_B, beta=beta)
    weights_BT = weights_BT * slope_B[:, None]
    # It has the gradient of the loss, and another value, which is taken off again.
    surrogate = projected_cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, rules=rules, shape=shape)
    return found._replace(loss=found.loss + surrogate - jax.lax.stop_gradient(surrogate))


def _compare(
    losses_B: jax.Array, reference_B: jax.Array, shares_B: jax.Array, *, beta: float
) -> tuple[PreferenceLoss, jax.Array]:
    """Return the loss of pairs, and its derivative by the rows' losses [B]."""
    rewards_n2 = beta * (reference_B - losses_B).reshape(-1, 2)
    margins_n, shares_n = rewards_n2[:, 0] - rewards_n2[:, 1], shares_B.reshape(-1, 2)[:, 0]
    found = PreferenceLoss(
        loss=(shares_n * jax.nn.softplus(-margins_n)).sum(),
        margin=(shares_n * margins_n).sum(),
        accuracy=(shares_n * (margins_n > 0)).sum(),
    )
    slope_n = beta * shares_n * jax.nn.sigmoid(-margins_n)
    return found, jnp.stack([slope_n, -slope_n], axis=1).reshape(-1)
