"""Choose the experts of each token, and the losses that keep their load even.

    x[B, T, D] @ weight[D, E] -> scores, float32        softmax over experts, or a sigmoid of each; with a bias of the
                                                        logits if `router_bias` is "trained"
    scores -> the k largest of each token               of the best groups of experts, if there are groups; with a bias
                                                        added for this choice alone if it is "on"
    their scores, divided by their sum -> weights       with which the outputs of the k experts are added

Scores and choice are computed in float32 whatever the compute dtype, since a rounded score chooses another expert.
Experts with equal scores are chosen by their number, the lowest first, on every mesh alike. Read `slots.py` next.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import num_manual_blocks
from ..collectives import own_tokens, sum_blocks
from ..config import ModelConfig
from ..partitioning import INIT_STD, make_param, param_metadata

_TINY = 1e-20


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Routing:
    """The experts of each token of this device.

    experts: int32 [B, T, k], a token's experts by number.
    weights: float32 [B, T, k], with which their outputs are added.
    scores: float32 [B, T, E], the share of each expert in a token's scores.
    logits: float32 [B, T, E].
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array
    logits: jax.Array


class Router(nnx.Module):
    """A linear map to one score for each expert, and the choice of the k largest.

    x[B@data, T, D] -> experts[B@data, T, k] and their weights; no communication.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config = config
        shape = (config.hidden_size, config.num_experts)
        # Not a "kernel": those are cast to the compute dtype.
        self.weight = make_param(rngs.params(), shape, ("embed", "router"), std=INIT_STD, rules=rules)
        zeros = jnp.zeros(config.num_experts, jnp.float32)
        metadata = param_metadata(("router",), rules)
        self.bias = nnx.Param(zeros, **metadata) if config.router_bias == "on" else nnx.data(None)
        self.logit_bias = nnx.Param(zeros, **metadata) if config.router_bias == "trained" else nnx.data(None)

    def __call__(self, x_BTD: jax.Array) -> Routing:
        """x[B@data, T, D] -> the routing of its tokens."""
        config = self.config
        logits = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), self.weight[...], precision="highest")
        if self.logit_bias is not None:
            logits = logits + self.logit_bias[...][None, None]
        raw = jax.nn.softmax(logits) if config.router == "softmax" else jax.nn.sigmoid(logits)
        # Only the choice reads the bias, so it has a gradient of zero; `balance.py` moves it.
        biased = raw if self.bias is None else raw + self.bias[...][None, None]
        experts = jax.lax.top_k(_in_kept_groups(biased, config), config.experts_per_token)[1]
        weights = jnp.take_along_axis(raw, experts, axis=-1)
        if config.router_normalize == "on":
            weights = weights / (weights.sum(-1, keepdims=True) + _TINY)
        scores = raw if config.router == "softmax" else raw / (raw.sum(-1, keepdims=True) + _TINY)
        return Routing(experts=experts, weights=weights * config.router_scale, scores=scores, logits=logits)


def _in_kept_groups(scores: jax.Array, config: ModelConfig) -> jax.Array:
    """Return the scores with -inf for experts outside a token's best groups (DeepSeek-AI 2024, "V3", section 2.1.2).

    A group is as good as its two best experts together where the router has a bias; else as its best one ("V2", section
    2.2.2).
    """
    if config.router_groups == config.router_groups_kept:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], config.router_groups, -1)
    num_best = min(2 if config.router_bias == "on" else 1, grouped.shape[-1])
    best = jax.lax.top_k(grouped, num_best)[0].sum(-1)
    kept = jax.lax.top_k(best, config.router_groups_kept)[1]
    is_kept = jax.nn.one_hot(kept, config.router_groups, dtype=bool).any(-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def count_tokens(routing: Routing, *, rules: ShardingRules) -> jax.Array:
    """Return the number of tokens that chose each expert, by sequence: float32 [B, E], of a context rank."""
    chosen = jax.nn.one_hot(routing.experts, routing.scores.shape[-1], dtype=jnp.float32).sum((1, 2))
    return sum_blocks(chosen, rules.token_axes)


def router_loss(
    routing: Routing, counts_BE: jax.Array, weights_BT: jax.Array, *, config: ModelConfig, rules: ShardingRules
) -> jax.Array:
    """Return the balance loss and the z-loss of a layer, weighted as its tokens are in the model's loss: float32 [].

    Balance is that of each whole sequence by itself (DeepSeek-AI 2024, "V3", equations 17 to 20), E / k times the sum
    over experts of the share of tokens that chose it and its mean score: at least 1. So it does not depend on
    microbatches and mesh; over context it costs two all-reduces of [B, E]. The z-loss is the mean square of the
    logarithm of a token's normaliser (Zoph et al. 2022, equation 5).

    Args:
        counts_BE: as of `count_tokens`.
        weights_BT: of all tokens of a context rank; they sum to 1 over the batch.
    """
    tokens, context = rules.token_axes, rules.axes("tokens")
    num_tokens = weights_BT.shape[1] * num_manual_blocks(context)
    mean_scores_BE = sum_blocks(routing.scores.sum(1), rules.axes("stream_tokens")) / num_tokens
    share_BE = sum_blocks(counts_BE, context) / (num_tokens * config.experts_per_token)
    balance_B = config.num_experts * (jax.lax.stop_gradient(share_BE) * mean_scores_BE).sum(-1)
    loss = config.balance_loss * (weights_BT.sum(-1) * balance_B).sum()
    if not config.router_z_loss:
        return loss
    own_BT = own_tokens(weights_BT, tokens) if num_manual_blocks(tokens) > 1 else weights_BT
    square = (own_BT * jax.nn.logsumexp(routing.logits, axis=-1) ** 2).sum()
    return loss + config.router_z_loss * sum_blocks(square, tokens)
