"""A decoder-only transformer of three parts: embedding, stacked blocks, head.

It runs without a pipeline under `jax.jit` on any data x tensor mesh; `../pipeline/model/split.py` cuts it into stages.
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice
from ..meshes.device_axes import manual_axes
from ..meshes.divisibility import check_divides
from .block import Remat, run_blocks, stack_blocks, stacks_of
from .collectives import enter_split, gather_tokens
from .config import ModelConfig
from .context.places import Places
from .embedding import Embedding
from .experts.kinds import layer_kinds
from .lora.check_config import lora_of_head
from .lora.head import adapted_table, make_head_adapter
from .norms import apply_norm, make_norm
from .options.logits import LogitShape
from .own.make import add_dims
from .partitioning import INIT_STD, make_param
from .preference.dpo import PreferenceLoss, preference_loss
from .projected_loss import ProjectedLosses, TokenScores, projected_losses, projected_scores


class Head(nnx.Module):
    """Final norm and projection to the vocabulary, through the embedding table where they are tied.

    x[B@data, T, D] -> logits[B@data, T, V@tensor] in float32; no communication forward.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.config, self.rules = config, rules
        self.norm = make_norm(config, rngs=rngs, rules=rules)
        shape = (config.vocab_size, config.hidden_size)
        # Drawn even where it is not used, as in embedding.py.
        own = make_param(rngs.params(), shape, ("vocab", "embed"), std=INIT_STD, rules=rules)
        self.table = own if config.embeddings == "untied" else nnx.data(None)
        self.lora = lora_of_head(config)
        self.lora_a, self.lora_b, self.lora_m = make_head_adapter(rngs, self.lora, own[...], rules)

    def __call__(self, x_BTD: jax.Array, *, embedding_VD: jax.Array) -> jax.Array:
        """x[B@data, T, D], embedding[V@tensor, D] (used when tied) -> logits[B@data, T, V@tensor].

        Inside `shard_map` the tables are this device's rows, and so are the logits; those of padding are the least
        float32 (see `vocabulary.py`). Outside padding is cut, and where there is some V is whole on every device.
        """
        axes = self.rules.axes("vocab")
        table_VD = self._table(embedding_VD).astype(self.config.dtype)
        x_BTD = gather_tokens(apply_norm(self.norm, x_BTD), self.rules.token_axes)
        x_BTD, table_VD = enter_split(x_BTD, table_VD, axes)
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)
        logits_BTV = LogitShape.of(self.config).apply(logits_BTV, axes)
        logits_BTV = self.rules.constrain(logits_BTV, ("batch", "tokens", "vocab"))
        return logits_BTV if manual_axes(axes) else logits_BTV[..., : self.config.vocab_size]

    def loss(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, embedding_VD: jax.Array
    ) -> jax.Array:
        """Return the weighted sum of cross-entropies without holding all logits (see `projected_loss.py`).

        x[B@data, T, D], targets and weights [B@data, T], embedding[V@tensor, D] (used when tied) -> []
        """
        return self.losses(x_BTD, targets_BT, weights_BT, embedding_VD=embedding_VD).loss

    def losses(
        self,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        *,
        embedding_VD: jax.Array,
        z_loss: float = 0.0,
    ) -> ProjectedLosses:
        """Return `loss` with a z-loss added, and that alone (see `projected_loss.py`)."""
        table_VD, x_BTD = self._table(embedding_VD), apply_norm(self.norm, x_BTD)
        how: dict[str, Any] = {"z_loss": z_loss, "rules": self.rules, "shape": LogitShape.of(self.config)}
        return projected_losses(x_BTD, table_VD, targets_BT, weights_BT, **how)

    def preference_loss(
        self, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, embedding_VD: jax.Array, **pairs: Any
    ) -> PreferenceLoss:
        """Return the loss of pairs of rows (see `preference/dpo.py`, which has the other arguments)."""
        table_VD, x_BTD = self._table(embedding_VD), apply_norm(self.norm, x_BTD)
        shape = LogitShape.of(self.config)
        return preference_loss(x_BTD, table_VD, targets_BT, weights_BT, **pairs, rules=self.rules, shape=shape)

    def scores(self, x_BTD: jax.Array, targets_BT: jax.Array, *, embedding_VD: jax.Array) -> TokenScores:
        """Return the log-likelihood of each target, and whether it is the likeliest word, [B@data, T]."""
        x_BTD = apply_norm(self.norm, x_BTD)
        shape = LogitShape.of(self.config)
        return projected_scores(x_BTD, self._table(embedding_VD), targets_BT, rules=self.rules, shape=shape)

    def _table(self, embedding_VD: jax.Array) -> jax.Array:
        if self.table is None:
            return embedding_VD
        return self.table[...] if self.lora is None else adapted_table(self, self.rules.axes("vocab"))


class Transformer(nnx.Module):
    """A decoder-only transformer: tokens[B@data, T] -> logits[B@data, T, V@tensor].

    >>> config = ModelConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4)
    >>> Transformer(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int)).shape
    (2, 16, 256)

    Args:
        rules: the mesh axes of each logical dimension; `model_rules(config, sizes)` fits them to a mesh.
        remat: rematerialization policy.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rules: ShardingRules = DEFAULT_RULES,
        remat: Remat = "dots",
    ) -> None:
        check_choice("remat", remat, get_args(Remat), error=ModelError)
        self.config, self.rules, self.remat = config, rules, remat
        self.embed = Embedding(config, rngs=rngs, rules=rules)
        self.blocks = stack_blocks(config, rngs=rngs, rules=rules)
        self.head = Head(config, rngs=rngs, rules=rules)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """tokens[B@data, T] -> logits[B@data, T, V@tensor] in float32."""
        return self.head(self.hidden(tokens_BT)[0], embedding_VD=self.embed.table[...])

    def loss(
        self, tokens_BT: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, places: Places | None = None
    ) -> jax.Array:
        """Return the weighted sum of cross-entropies and of routers' losses; means where the weights sum to 1.

        tokens, targets and weights [B@data, T] -> [], float32
        """
        x_BTD, of_routers = self.hidden(tokens_BT, weights_BT, places)
        return self.head.loss(x_BTD, targets_BT, weights_BT, embedding_VD=self.embed.table[...]) + of_routers

    def hidden(
        self, tokens_BT: jax.Array, weights_BT: jax.Array | None = None, places: Places | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return what the head is given, x[B@data, T, D], and the sum of the losses of routers, float32 [].

        tokens[B@data, T]; without the weights of tokens in the loss [B@data, T] routers add none.
        """
        x_BTD = self.embed(tokens_BT, positions_BT=places.positions if places else None)
        of_routers = jnp.zeros((), jnp.float32)
        given: dict[str, Any] = {"weights_BT": weights_BT, "places": places, "remat": self.remat}
        for stack, kind in zip(stacks_of(self.blocks), layer_kinds(self.config), strict=True):
            graph, params_L = nnx.split(stack)
            own_L = kind.first + jnp.arange(kind.num_layers) if self.config.attention_pattern else None
            x_BTD, own = run_blocks(graph, params_L, x_BTD, numbers_L=own_L, **given)
            of_routers += own
        return x_BTD, of_routers


def model_rules(
    config: ModelConfig, sizes: Mapping[str, int], *, rules: ShardingRules = DEFAULT_RULES
) -> ShardingRules:
    """Return the rules fitted to a model and a mesh: too few key/value heads for the `tensor` axis are replicated.

    A vocabulary need not divide: `split_transformer` and the server pad its tables, see `vocabulary.py`.

    Args:
        sizes: size of each mesh axis by name, as in `mesh.shape` or `MeshSpec.sizes`.
        rules: `ShardingRules.of(spec.roles)` if the axes have names of their own.

    Raises:
        MeshError: an axis with several devices has no role.
        ModelError: heads or feed-forward features do not split evenly, with the equation.
    """
    rules.check_axes(sizes)
    rules = add_dims(rules, config)
    split = {} if config.block else {"num_heads": "heads"}
    if config.num_experts:
        split |= {"num_experts": "experts", "expert_size": "ffn", "shared_size": "ffn"}
    else:
        _check_no_experts(rules, sizes)
    if config.dense_layers or not (config.num_experts or config.block or config.mlp_class):
        split |= {"ffn_size": "ffn"}
    for field, dim in split.items():
        axis, parts = _parts(rules, dim, sizes)
        check_divides(field, getattr(config, field), over=axis, parts=parts, error=ModelError)
    # A query head needs its key/value head on its device: whole heads are split over the axis, or each is repeated on
    # equally many devices.
    axis, parts = _parts(rules, "kv_heads", sizes)
    heads = config.num_kv_heads
    if heads % parts == 0:
        return rules
    if parts % heads == 0:
        return rules.replace(kv_heads=None)
    raise ModelError(
        f"num_kv_heads={heads} and {axis}={parts}: neither divides the other, so heads cannot be split or replicated "
        "evenly.",
        fix=f"choose a {axis} size that divides {heads} or is a multiple of it.",
    )


def _check_no_experts(rules: ShardingRules, sizes: Mapping[str, int]) -> None:
    axis, parts = _parts(rules, "experts", sizes)
    if parts > 1:
        raise ModelError(
            f"{axis}={parts} splits experts, and the model has none.", fix=f"set {axis}=1, or model.num_experts."
        )


def _parts(rules: ShardingRules, dim: str, sizes: Mapping[str, int]) -> tuple[str, int]:
    """Return the axes of a dimension as text, and the number of parts they split it into."""
    return " x ".join(rules.axes(dim)), rules.num_parts(dim, sizes)


def param_dims(model: Transformer) -> dict[str, Any]:
    """Return the logical dimensions of every parameter, in a tree shaped like the parameters; stacks lead with "layer".

    >>> config = ModelConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4)
    >>> param_dims(Transformer(config, rngs=nnx.Rngs(0)))["blocks"]["mlp"]["up"]["kernel"]
    ('layer', 'embed', 'ffn')
    """
    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(nnx.map_state(lambda _, leaf: leaf.get_metadata("out_sharding"), state))
