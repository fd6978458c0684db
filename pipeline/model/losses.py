"""What the last stage computes from the model's last activation: the loss of the next token, or of preferences.

A loss is a function of the head, x[B@data, T, D], the microbatch and the embedding's table, and runs inside `last`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from ...layers import Head
from .protocol import Output

Microbatch = Mapping[str, jax.Array]
LossFn = Callable[[Head, jax.Array, Microbatch, jax.Array], Any]
"""Function (head, x, microbatch, table) -> loss or `Output`."""

Z_LOSS = "head.z_loss"
"""Metric of the loss of the next token with a z-loss; its name is none that a block would give."""

REWARDS = ("reward_margin", "reward_accuracy")
"""Metrics of the loss of preferences."""


def next_token_loss(head: Head, x_BTD: jax.Array, microbatch: Microbatch, table_VD: jax.Array) -> jax.Array:
    """Return the weighted sum of the cross-entropies of tokens.

    A microbatch has `targets` and `weights` [B@data, T].
    """
    return head.loss(x_BTD, microbatch["targets"], microbatch["weights"], embedding_VD=table_VD)


def make_next_token_loss(z_loss: float) -> LossFn:
    """Return the loss of the next token, with `z_loss` x (log Z)^2 of every token added (`layers/projected_loss.py`).

    A step has the metric `Z_LOSS`, the part of the loss that is added; none for a `z_loss` of 0.
    """
    if not z_loss:
        return next_token_loss

    def loss(head: Head, x_BTD: jax.Array, microbatch: Microbatch, table_VD: jax.Array) -> Output:
        tokens = microbatch["targets"], microbatch["weights"]
        found = head.losses(x_BTD, *tokens, embedding_VD=table_VD, z_loss=z_loss)
        assert found.z_loss is not None
        return Output(loss=found.loss, metrics={Z_LOSS: found.z_loss})

    return loss


def make_preference_loss(beta: float) -> LossFn:
    """Return the loss of pairs of rows, chosen before rejected (see `layers/preference/dpo.py`).

    A microbatch has besides `reference` and `shares` [B@data, 1], for each row the loss by the reference, and the share
    of its pair in the mean. A step has the metrics `REWARDS`.
    """

    def loss(head: Head, x_BTD: jax.Array, microbatch: Microbatch, table_VD: jax.Array) -> Output:
        found = head.preference_loss(
            x_BTD,
            microbatch["targets"],
            microbatch["weights"],
            embedding_VD=table_VD,
            reference_B=microbatch["reference"][:, 0],
            shares_B=microbatch["shares"][:, 0],
            beta=beta,
        )
        return Output(loss=found.loss, metrics=dict(zip(REWARDS, (found.margin, found.accuracy), strict=True)))

    return loss
