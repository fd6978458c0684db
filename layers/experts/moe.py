"""A feed-forward layer of E experts, of which each token uses k (Shazeer et al. 2017; DeepSeek-AI 2024).

    x[B, T, D] -- router --> experts and weights of each token
       |
       +-- rows of each expert [E, C, D] -- all-to-all over expert --> rows of this device's experts [E/e, e C, D]
                                                                          | gate, up, down of each expert
       y[B, T, D] <-- weighted sum of a token's rows <-- all-to-all ------+

Devices that split experts have other tokens, of other sequences (axis `expert`) or of the same ones (`context_expert`),
and each holds E/e of the experts: a group of e devices has all. No token is left out
(`config.expert_overflow="rounds"`): an expert has room for C tokens at a time, and where any has more, all devices of
the group go through another round. With "drop" tokens beyond C pass the layer by, and are counted. Features of an
expert are split over tensor as those of `MLP`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying, num_manual_blocks
from ..collectives import gather_tokens, leave_split, max_blocks, run_in_blocks
from ..config import ModelConfig
from ..lora.check_config import lora_of
from ..mlp import MLP, gate_of
from ..partitioning import INIT_STD
from .linear import ExpertLinear, mark_adapters
from .rounds import Kernels, Room, add_further_rounds, run_round
from .router import Router, count_tokens, router_loss
from .slots import order_pairs
from .summed import is_sum_cheaper, run_own_experts


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """What a layer of experts adds to sums of the step, besides its output.

    loss: balance and z-loss, float32 []; None where no weights of tokens were given.
    metrics: `expert_tokens` float32 [E], the pairs of tokens and experts, and `dropped_pairs` float32 [].
    """

    loss: jax.Array | None = None
    metrics: dict[str, jax.Array] = field(default_factory=dict)


class MoE(nnx.Module):
    """Router, experts and shared experts: x[B@(data, expert), T, D] -> y[B@(data, expert), T, D].

    Sends two all-to-all over expert forward, each of C rows of D for every expert, and two backward; over tensor as
    `MLP` does. Every token also goes through the shared experts, one `MLP`, if the config has any.

    >>> sizes = {"vocab_size": 256, "num_layers": 1, "hidden_size": 64, "num_heads": 4, "bias": "off"}
    >>> config = ModelConfig(num_experts=8, experts_per_token=2, **sizes)
    >>> MoE(config, rngs=nnx.Rngs(0))(jnp.ones((2, 16, 64)))[0].shape
    (2, 16, 64)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        e, d, f = config.num_experts, config.hidden_size, config.expert_size
        self.router = Router(config, rngs=rngs, rules=rules)
        shared: dict[str, Any] = {"rngs": rngs, "rules": rules}
        of_experts: dict[str, Any] = {"bias": config.other_bias, "dtype": config.dtype} | shared
        up, gate, down = (lora_of(config, f"mlp.experts.{own}") for own in ("up", "gate", "down"))
        into, out = ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
        self.up = ExpertLinear((e, d, f), into, std=INIT_STD, lora=up, **of_experts)
        self.gate = nnx.data(None)
        if config.is_gated:
            self.gate = ExpertLinear((e, d, f), into, std=INIT_STD, lora=gate, **of_experts)
        std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.down = ExpertLinear((e, f, d), out, std=std, lora=down, **of_experts)
        self.shared = nnx.data(None)
        if config.shared_size:
            self.shared = MLP(config, features=config.shared_size, name="mlp.shared", **shared)

    def __call__(self, x_BTD: jax.Array, weights_BT: jax.Array | None = None) -> tuple[jax.Array, ExpertStats]:
        """x[B@data, T, D], weights of the loss [B@data, T] -> y[B@data, T, D] and what is added to sums of the step.

        Raises:
            ShardingError: experts, their features or B do not split evenly.
        """
        routing = self.router(x_BTD)
        counts_BE = count_tokens(routing, rules=self.rules)
        kernels = self._kernels
        tokens = ("batch", "stream_tokens", None)
        of_kernels = Kernels(up=self.up.dims, gate=self.gate and self.gate.dims, down=self.down.dims)
        run = run_in_blocks(
            self._run, rules=self.rules, in_dims=(tokens, tokens, tokens, of_kernels), out_dims=(tokens, ())
        )
        y_BTD, dropped = run(x_BTD, routing.experts, routing.weights, kernels)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        loss = None
        if weights_BT is not None:
            loss = router_loss(routing, counts_BE, weights_BT, config=self.config, rules=self.rules)
        metrics = {"expert_tokens": counts_BE.sum(0), "dropped_pairs": dropped}
        return y_BTD, ExpertStats(loss=loss, metrics=jax.lax.stop_gradient(metrics))

    def extend(self, x_BTD: jax.Array) -> jax.Array:
        """Return the output for new tokens in a server, inside `shard_map`: x[B@(data, expert), T, D] -> y.

        All devices along expert must run it together. The way to the experts is the one that sends less, see
        `summed.py`.
        """
        axes, rows = self.rules.axes("experts"), x_BTD.shape[0] * x_BTD.shape[1]
        parts = num_manual_blocks(axes)
        if parts == 1 or not is_sum_cheaper(self.config, num_tokens=rows, parts=parts):
            return self(x_BTD)[0]
        x_nD = x_BTD.reshape(rows, -1)
        room = self._room(rows * parts, axes=())
        y_nD = run_own_experts(x_nD, self.router, self._kernels, room=room, axes=axes)
        y_BTD = leave_split(y_nD.reshape(x_BTD.shape), self.rules.axes("ffn"))
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    @property
    def _kernels(self) -> Kernels:
        return Kernels(up=self.up.weights, gate=self.gate and self.gate.weights, down=self.down.weights)

    def _room(self, num_tokens: int, *, axes: tuple[str, ...]) -> Room:
        """Return the room of the experts for so many tokens of a device; over `axes` they are exchanged."""
        capacity, features = self.config.expert_rows(num_tokens), self.rules.axes("ffn")
        trained: Literal["all", "adapters"] = "adapters" if self.config.lora_rank else "all"
        return Room(capacity=capacity, axes=axes, features=features, gate=gate_of(self.config), trained=trained)

    def _run(
        self, x_BTD: jax.Array, experts_BTk: jax.Array, weights_BTk: jax.Array, kernels: Kernels
    ) -> tuple[jax.Array, jax.Array]:
        """Return what this device's tokens get of all experts, and the number of pairs that are left out."""
        config, features, tokens = self.config, self.rules.axes("ffn"), self.rules.token_axes
        # Each device of tensor has all tokens of its group, and a part of the features of each expert.
        whole = [mark_varying(gather_tokens(leaf, tokens), manual_axes(features)) for leaf in (x_BTD, weights_BTk)]
        x_BTD, weights_BTk = whole
        experts_BTk = gather_tokens(experts_BTk, tokens)
        x_nD, weights_nk, experts_nk = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (*whole, experts_BTk))
        order = order_pairs(experts_nk, num_experts=config.num_experts)
        room = self._room(len(x_nD), axes=self.rules.axes("experts"))
        given = (x_nD.astype(config.dtype), weights_nk, mark_adapters(kernels, features))
        y_nD = run_round(*given, room.slots(order, 0), room)
        dropped = jnp.zeros((), jnp.int32)
        if room.capacity < len(x_nD):
            left = jnp.maximum(order.counts - room.capacity, 0).sum()
            if config.expert_overflow == "drop":
                # Tokens may be split over the axes that split features.
                dropped = max_blocks(left, tuple(dict.fromkeys((*features, *tokens))))
            else:
                y_nD = add_further_rounds(y_nD, given, order, room)
        return leave_split(y_nD.reshape(x_BTD.shape), features, tokens=tokens), dropped.astype(jnp.float32)

    def join(self) -> None:
        """Join what reads the same input in the shared experts, see `MLP.join`."""
        if self.shared is not None:
            self.shared.join()
