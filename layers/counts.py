"""Parameters, flops and activation bytes of a model, computed from its config: no array is made, nothing is traced.

The planner compares layouts with these numbers and the training loop reports MFU with them, so they are exact: tests
compare them with the parameters, the matmuls and the residuals of the layers.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ..meshes import ModelError
from ..meshes.arguments import check_choice, check_count
from .attention.counts import attention_vectors, attention_weights, attention_widths
from .block import Remat
from .config import ModelConfig
from .experts.kinds import layer_kinds
from .lora.counts import count_adapters, count_head_adapter, products_width, scaled_widths, used_weights
from .options.check_config import windows_of_layers
from .own.check_config import has_own_classes
from .own.counts import block_params, norm_params, own_flops
from .own.trace import kept_bytes
from .transformer import model_rules

_SUM_BYTES = 4
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Number of parameters of every part of a model; `block` counts one of `num_layers` blocks, with all its experts.

    In a model whose first `dense_layers` are dense, `dense_block` counts one of these, and `block` one of the others.
    `head` counts the final norm, and the projection to the vocabulary where it is not tied to the embedding; `adapters`
    those of all blocks, which `block` leaves out, and `head_adapter` that of the output table.
    """

    embedding: int
    positions: int
    block: int
    num_layers: int
    head: int
    dense_block: int = 0
    dense_layers: int = 0
    adapters: int = 0
    head_adapter: int = 0

    @property
    def blocks(self) -> int:
        """Number of parameters of all blocks."""
        return self.dense_layers * self.dense_block + (self.num_layers - self.dense_layers) * self.block

    @property
    def total(self) -> int:
        """Number of parameters of the whole model, tied ones counted once."""
        return self.embedding + self.positions + self.blocks + self.head + self.adapters + self.head_adapter

    @property
    def trained(self) -> int:
        """Number of parameters that are trained: those of adapters where there are any, else all."""
        return self.adapters + self.head_adapter or self.total


@dataclass(frozen=True, kw_only=True)
class FlopCounts:
    """Model flops for one token, without recomputation (Chowdhery et al. 2022, appendix B).

    `weights` counts matmuls with parameters that a token uses, 2 flops for each weight, with the vocabulary projection
    and without the embedding lookup; `scores` counts the two matmuls between tokens, over all layers; `frozen` those of
    `weights` whose parameters have no gradient.
    """

    weights: int
    scores: int
    frozen: int = 0

    @property
    def forward(self) -> int:
        """Flops of the forward pass for one token."""
        return self.weights + self.scores

    @property
    def training(self) -> int:
        """Flops of forward and backward for one token: each matmul has two in the backward, hence three times.

        One with frozen weights has one in the backward.
        """
        return 3 * self.forward - self.frozen


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Bytes on one device for one microbatch: `boundary` between two layers, `layer` the residuals of one layer.

    A layer keeps its input, so `layer` includes one `boundary`. With `dense_layers` it is one of the others.
    """

    boundary: int
    layer: int


def param_counts(config: ModelConfig) -> ParamCounts:
    """Return the exact number of parameters of each part.

    >>> param_counts(ModelConfig(vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12, max_tokens=1024)).total
    124439808
    """
    d = config.hidden_size
    table, blocks = config.vocab_size * d, [_block_params(kind.config) for kind in layer_kinds(config)]
    return ParamCounts(
        embedding=table,
        positions=config.max_tokens * d if config.positions == "learned" else 0,
        block=blocks[-1],
        num_layers=config.num_layers,
        head=_norm_params(config) + (table if config.embeddings == "untied" else 0),
        dense_block=blocks[0] if config.dense_layers else 0,
        dense_layers=config.dense_layers,
        adapters=count_adapters(config),
        head_adapter=count_head_adapter(config),
    )


def _block_params(config: ModelConfig) -> int:
    """Return the number of parameters of one block, with all its experts."""
    if has_own_classes(config):
        return block_params(config)
    biases = config.query_size + 2 * config.kv_size if config.qkv_bias == "on" else 0
    if config.other_bias == "on":
        biases += config.hidden_size + _ffn_biases(config)
    if config.router_bias != "off":
        biases += config.num_experts
    norms = config.num_block_norms * _norm_params(config) + attention_vectors(config)
    return _block_weights(config, experts=config.num_experts) + biases + norms


def _ffn_biases(config: ModelConfig) -> int:
    """Return the biases of a feed-forward, or of all experts and the shared ones."""
    d, num_up = config.hidden_size, 2 if config.is_gated else 1
    if not config.num_experts:
        return num_up * config.ffn_size + d
    shared = num_up * config.shared_size + d if config.shared_size else 0
    return config.num_experts * (num_up * config.expert_size + d) + shared


def _norm_params(config: ModelConfig) -> int:
    if config.norm_class:
        return norm_params(config)
    return config.hidden_size * (2 if config.norm == "layernorm" and config.other_bias == "on" else 1)


def flops_per_token(
    config: ModelConfig, *, num_tokens: int, attention: Literal["causal", "full"] = "causal"
) -> FlopCounts:
    """Return the model flops of one token in a sequence of `num_tokens`.

    For short sequences `training` is near 6 flops per parameter (Kaplan et al. 2020, section 2.1); the scores add
    12 x layers x heads x head size x tokens (Chowdhery et al. 2022, appendix B), or half of that when causal. What
    classes of the user's compute is part of `weights`, see `own/counts.py`.

    >>> config = ModelConfig(vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12, max_tokens=1024)
    >>> flops_per_token(config, num_tokens=1024).training
    797815296

    Args:
        attention: "causal" counts the scores that the mask leaves visible, half of them, or fewer with a window. "full"
            counts all, as papers that follow Chowdhery et al. do.

    Raises:
        ModelError: `num_tokens` is below 1, or `attention` is not one of the choices.
    """
    check_count("num_tokens", num_tokens, error=ModelError)
    check_choice("attention", attention, ("causal", "full"), error=ModelError)
    weights = config.vocab_size * config.hidden_size
    for kind in layer_kinds(config):
        weights += kind.num_layers * _block_weights(kind.config, experts=config.experts_per_token)
    full = 2 * num_tokens * (config.query_size + config.value_size) * config.num_layers
    if config.block or config.attention_class:
        full = 0
    causal = 0
    for own in windows_of_layers(config):
        window = min(own or num_tokens, num_tokens)
        # Of the T x T scores, w (2T - w) / 2 are visible: a triangle of side T less one of side T - w.
        causal += full // config.num_layers * window * (2 * num_tokens - window) // (2 * num_tokens**2)
    adapters, scores = used_weights(config), full if attention == "full" else causal
    own = config.num_layers * own_flops(config, num_tokens=num_tokens)
    return FlopCounts(weights=2 * (weights + adapters) + own, scores=scores, frozen=2 * weights if adapters else 0)


def activation_bytes(
    config: ModelConfig,
    *,
    num_sequences: int,
    num_tokens: int,
    tensor: int = 1,
    sequence: Literal["off", "on"] = "off",
    remat: Remat = "none",
    key_ranks: int = 1,
) -> ActivationBytes:
    """Return the activation bytes on one device of one microbatch, of `num_sequences` on a data shard.

    The formula follows Korthikanti et al. 2022, section 4, with the residuals of our own layers as terms:

        full  D                                  the input x[b, T, D]
        dots  2D + (2N + 2K)H/t + (1 or 2)F/t    x, the outputs of weight matmuls, but the last one, and of attention
        none  4D + (2N + 2K)H/t + (2 or 3)F/t    x, the norms, the input of each matmul

    With sequence parallelism every D is D/t. "dots" and "none" also keep a float32 number for each query and head, and
    r for each adapter; "none" (N + K)H/t for normed queries and keys, and up to 2D for norms of outputs. Magnitudes
    keep what they scale, "dots" D alone. Experts keep shared features as F, and 2D + (1 to 3)F'/t a row; "none" is
    within 1% there. Classes of the user's keep what the jaxpr of their vjp does.

    Args:
        tensor, sequence: size of the axis that splits heads and features, and whether it splits x by tokens too.
        key_ranks: context ranks of `num_tokens` each whose keys and values are kept, 1 for those of the tokens alone.

    Raises:
        ModelError: a count is below 1, or heads or feed-forward features do not split evenly over `tensor`.
    """
    _check_sizes(config, remat, sequence, num_sequences=num_sequences, num_tokens=num_tokens, tensor=tensor)
    item_bytes, numbers = _ITEM_BYTES[config.dtype], num_sequences * num_tokens
    d = config.hidden_size // (tensor if sequence == "on" else 1)
    if has_own_classes(config):
        own = kept_bytes(config, num_tokens=num_tokens, tensor=tensor, sequence=sequence, remat=remat)
        return ActivationBytes(boundary=numbers * d * item_bytes, layer=num_sequences * own)
    kept = numbers * _kept_width(config, d=d, tensor=tensor, remat=remat, key_ranks=key_ranks) * item_bytes
    sums = numbers * _kept_sums(config, tensor=tensor, remat=remat) * _SUM_BYTES
    experts = _expert_bytes(config, numbers, tensor=tensor, own=numbers * d // config.hidden_size, remat=remat)
    return ActivationBytes(boundary=numbers * d * item_bytes, layer=kept + sums + experts)


def _check_sizes(config: ModelConfig, remat: Remat, sequence: Literal["off", "on"], **counts: int) -> None:
    check_choice("remat", remat, get_args(Remat), error=ModelError)
    check_choice("sequence", sequence, ("off", "on"), error=ModelError)
    for name, count in counts.items():
        check_count(name, count, error=ModelError)
    model_rules(config, {"tensor": counts["tensor"]})


def _kept_sums(config: ModelConfig, *, tensor: int, remat: Remat) -> int:
    """Return the float32 numbers that a layer keeps for one token: of the softmax, and mean squares over all heads."""
    squares = 2 if config.qk_norm == "whole" and remat == "none" else 0
    return 0 if remat == "full" else config.num_heads // tensor + squares


def _expert_bytes(config: ModelConfig, num_tokens: int, *, tensor: int, own: int, remat: Remat) -> int:
    """Return the bytes that a mixture of experts keeps in one layer besides the width of a dense one.

    Args:
        own: tokens of this device between layers.
    """
    if not config.num_experts or remat == "full":
        return 0
    rows, f = config.num_experts * config.expert_rows(num_tokens), config.expert_size // tensor
    num_up = 2 if config.is_gated else 1
    width = 2 * config.hidden_size + (num_up + (remat == "none")) * f
    # Logits of the router; without rematerialization also its scores' parts, and where each pair goes.
    numbers = own * config.num_experts
    if remat == "none":
        numbers += (7 * config.experts_per_token + 4) * num_tokens + rows
    return rows * width * _ITEM_BYTES[config.dtype] + numbers * _SUM_BYTES


def _kept_width(config: ModelConfig, *, d: int, tensor: int, remat: Remat, key_ranks: int) -> int:
    """Return the number of residuals, in the compute dtype, that a layer keeps for one token.

    Args:
        d: features of x for one token on this device, on average.
    """
    f = (config.shared_size if config.num_experts else config.ffn_size) // tensor
    own, num_up = attention_widths(config, tensor=tensor), 2 if config.is_gated else 1
    # Vectors that are whole over tensor, of as many tokens as x is.
    latents, shared = (width * d // config.hidden_size for width in (own.latents, own.shared))
    small = products_width(config, d=d)
    normed_heads = own.query + own.key if config.qk_norm != "off" else 0
    # A norm keeps its input: where it follows the last product, that product's output.
    num_outputs, num_whole = 2 if config.norm_place == "before" else 3, 2 + config.num_block_norms
    dots = num_outputs * d + own.projected + own.mixed + latents + shared + num_up * f + small
    none = num_whole * d + own.query + own.key + own.value + own.mixed + 2 * latents
    none += (num_up + 1) * f + normed_heads + small
    if config.lora_magnitude == "on":
        scaled = scaled_widths(config, own, d=d, tensor=tensor)
        # The gradient of a magnitude takes the column before it is scaled; sums that are kept are those of `out`.
        dots += sum(width for name, width in scaled.items() if name.endswith(".down") and name.startswith("mlp"))
        none += sum(scaled.values())
    gathered = _gathered_width(config, tensor=tensor, remat=remat, key_ranks=key_ranks)
    return {"full": d, "dots": dots, "none": none}[remat] + gathered


def _gathered_width(config: ModelConfig, *, tensor: int, remat: Remat, key_ranks: int) -> int:
    """Return the residuals more for one token where keys and values of several context ranks are kept."""
    check_count("key_ranks", key_ranks, error=ModelError)
    if key_ranks == 1 or remat == "full":
        return 0
    own = attention_widths(config, tensor=tensor)
    return key_ranks * (own.key + own.value) - replaced_width(config, tensor=tensor, remat=remat)


def replaced_width(config: ModelConfig, *, tensor: int, remat: Remat) -> int:
    """Return the residuals of one token whose place gathered keys and values take: a device's own.

    With "dots" these are outputs of products, of which norms of keys and the maps from latents still read some.
    """
    own = attention_widths(config, tensor=tensor)
    if remat == "none":
        return own.key + own.value
    if remat == "full" or config.latent_size:
        return 0
    return own.value + (own.key if config.qk_norm == "off" else 0)


def _block_weights(config: ModelConfig, *, experts: int) -> int:
    """Count the matmul weights of a block: query and output, key and value, and the feed-forward's two or three.

    Those of classes of the user's are left out.

    Args:
        experts: of a mixture of experts, how many are counted: all, or those that a token uses.
    """
    d = config.hidden_size
    num_ffn = 3 if config.is_gated else 2
    attention = 0 if config.block or config.attention_class else attention_weights(config)
    if config.block or config.mlp_class:
        return attention
    if not config.num_experts:
        return attention + num_ffn * d * config.ffn_size
    return attention + d * config.num_experts + num_ffn * d * (experts * config.expert_size + config.shared_size)
