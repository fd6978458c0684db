"""The sizes and choices that define a model.

Counts that follow from a `ModelConfig` are in `counts.py`. Read `transformer.py` next.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from ..meshes import ModelError
from ..meshes.arguments import check_fields
from ..meshes.divisibility import check_divides
from ..meshes.errors import shown
from .experts.check_config import check_experts
from .latent.check_config import check_latents
from .lora.check_config import check_lora
from .options.check_config import check_options
from .own.check_config import check_own
from .rope.check_config import check_rope

LARGEST_FUSED_HEAD, LARGEST_WIDE_HEAD = 128, 256
"""Largest head sizes that cuDNN's flash attention supports, forward and backward, from Ampere and from Hopper on.

jax (0.10.2 to 0.12) asks the local GPU for its architecture, not the mesh, and raises where there is none, so wide
heads have a call of our own (`attention/wide_heads.py`).
"""

_LATENT_HEADS = (192, 128)
"""Features of keys and of values for which cuDNN has a kernel although they differ: DeepSeek's."""

_MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1
"""Layers are assigned to stages one by one; every other size is an array dimension or a position, of 32 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a decoder-only transformer: GPT-2, Llama, Qwen, Mistral and combinations of their choices.

    `num_kv_heads`, `head_size` and `ffn_size` may be left out: they become `num_heads` (multi-head attention),
    `hidden_size / num_heads`, and 4 x hidden (GELU) or 8/3 x hidden rounded up to 64 (SwiGLU).

    `mlp` "geglu" and `norm` "rmsnorm1p" are Gemma's: gelu(gate) x up, and an RMSNorm whose scale is stored minus one;
    "clamped_swiglu" is gpt-oss's, see `clamped_gate` in `mlp.py`.
    `bias` "qkv" is Qwen 2's: only queries, keys and values have one. `qk_norm` "on" is Qwen 3's, an RMSNorm over the
    features of every query and key head; "whole" is OLMo 2's, over those of all heads. `norm_place` says whether
    attention and feed-forward layers have a norm of their input, of their output (OLMo 2), or of both (Gemma 2).

    `attention_window` is the number of tokens visible to a token, itself included; 0 is all. `attention_pattern` names
    the kinds of attention of the layers, repeated, where they differ: "full", "window" or "unrotated", see
    `options/by_layer.py`. With `attention_sinks` every head has a learned score without a key (`options/sinks.py`).
    `attention` selects the kernel, see `flash.py`; `rope_scaling` is explained in `rope/frequencies.py`.
    `rope_head_size` is the number of features of a head that are rotated; 0 is all.

    With `latent_size` keys and values of all heads are computed from one vector of that size, DeepSeek's; see
    `latent/attention.py`.

    With `num_experts` every layer is a mixture of experts of `expert_size` features each, `ffn_size` if left out, and
    of `shared_size` features that all tokens use; but the first `dense_layers` are dense, of `ffn_size`.
    See `experts/`.

    `block` names a class of the user's own in place of ours, "module:Class"; `mlp_class`, `norm_class` and
    `attention_class` do so for a part of a block, and `dims` adds rules for names of dimensions, "inner=tensor". See
    `own/`.

    In training `dropout` is the share of the numbers of every branch, attention's and the feed-forward's, that are set
    to zero, and `stochastic_depth` that of the branches of the last layer, see `dropout.py`.

    Granite multiplies rows of the embedding by `embedding_scale`, what layers add to the residual stream by
    `residual_scale`, and logits by `logit_scale`; `attention_scale` is the factor of scores, 1 / sqrt(head_size) if it
    is 0. Gemma 2 caps scores and logits, c tanh(s / c), by `attention_softcap` and `logit_softcap`. See `options/`.

    With `lora_rank` the linear layers `lora_targets`, all if left out, have adapters, and all else is frozen; see
    `lora/`.

    Raises:
        ModelError: a value has the wrong type or is not among the choices, a size is not positive, or sizes do not
            divide each other; each with the equation.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int = 0
    head_size: int = 0
    ffn_size: int = 0
    max_tokens: int = 2048
    mlp: Literal["gelu", "swiglu", "geglu", "clamped_swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm", "rmsnorm1p"] = "layernorm"
    norm_epsilon: float = 1e-5
    norm_place: Literal["before", "after", "both"] = "before"
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_tokens: int = 0
    rope_truncate: Literal["on", "off"] = "on"
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()
    rope_attention_factor: float = 0.0
    rope_mscale_all: float = 0.0
    rope_head_size: int = 0
    latent_size: int = 0
    query_latent_size: int = 0
    value_head_size: int = 0
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    attention_window: int = 0
    attention_pattern: tuple[str, ...] = ()
    window_rope_theta: float = 0.0
    attention_softcap: float = 0.0
    attention_sinks: Literal["off", "on"] = "off"
    qk_norm: Literal["on", "whole", "off"] = "off"
    bias: Literal["on", "qkv", "off"] = "on"
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: int = 0
    expert_capacity: float = 1.25
    expert_overflow: Literal["rounds", "drop"] = "rounds"
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_normalize: Literal["on", "off"] = "on"
    router_scale: float = 1.0
    router_groups: int = 1
    router_groups_kept: int = 1
    router_bias: Literal["on", "trained", "off"] = "off"
    router_bias_rate: float = 0.001
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    embeddings: Literal["tied", "untied"] = "tied"
    block: str = ""
    mlp_class: str = ""
    norm_class: str = ""
    attention_class: str = ""
    dims: tuple[str, ...] = ()
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    lora_magnitude: Literal["off", "on"] = "off"
    lora_base: Literal["plain", "nf4"] = "plain"
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmuls: Literal["plain", "fp8"] = "plain"

    def __post_init__(self) -> None:
        # Signs and upper limits are checked below, with a fix for each.
        check_fields(self, error=ModelError, least=None)
        self._check_sizes()
        self._derive()
        check_divides(
            "num_heads",
            self.num_heads,
            over="num_kv_heads",
            parts=self.num_kv_heads,
            error=ModelError,
            rule="every key/value head serves the same number of query heads, but ",
            fix=f"set num_kv_heads to a divisor of {self.num_heads}.",
        )
        if self.attention_window < 0:
            raise ModelError(
                f"attention_window={self.attention_window} is negative.", fix="set 0, for attention to all before it."
            )
        self._check_attention()
        check_rope(self)
        check_latents(self)
        check_experts(self)
        check_lora(self)
        check_options(self)
        check_own(self)
        self._check_noise()

    def _check_attention(self) -> None:
        if self.attention == "cudnn" and not self.can_be_fused:
            raise ModelError(
                f"attention='cudnn' with dtype={self.dtype!r} and head_size={self.head_size}: cuDNN's flash attention "
                f"takes bfloat16 and heads of a multiple of 8 features, at most {LARGEST_FUSED_HEAD}, or "
                f"{LARGEST_WIDE_HEAD} from Hopper on"
                f"{', and no attention_softcap' if self.attention_softcap else ''}.",
                fix="set attention='auto', dtype='bfloat16', or another head_size.",
            )

    def _check_noise(self) -> None:
        for name in ("dropout", "stochastic_depth"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ModelError(f"{name}={rate} is no share below 1.", fix=f"set {name}=0.1, say, or 0 for none.")
            if rate and self.block:
                raise ModelError(
                    f"{name}={rate} with block={self.block!r}: a block of your own has the branches that it has.",
                    fix=f"leave {name} out; `layers.dropout` with info.keys() drops in a block.",
                )

    def _check_sizes(self) -> None:
        for name, kind in ((field.name, field.type) for field in fields(self)):
            most = _MOST_LAYERS if name == "num_layers" else _LARGEST_SIZE
            if kind is int and getattr(self, name) > most:
                raise ModelError(
                    f"{name}={shown(getattr(self, name))} is too large: {most} is the most.",
                    fix=f"set {name}={most} or less.",
                )
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "max_tokens"):
            if getattr(self, name) < 1:
                raise ModelError(
                    f"{name}={getattr(self, name)}: a model needs at least 1.", fix=f"set {name}=1 or more."
                )
        for name in ("num_kv_heads", "head_size", "ffn_size"):
            if getattr(self, name) < 0:
                raise ModelError(
                    f"{name}={getattr(self, name)} is negative.", fix=f"leave {name} out (0) to have it derived."
                )
        for name in ("norm_epsilon", "rope_theta", "rope_factor"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name}={getattr(self, name)} must be above 0.", fix=f"leave {name} out.")

    def _derive(self) -> None:
        """Fill in the sizes that were left out; the dataclass is frozen, so by `object.__setattr__`."""
        if not self.head_size:
            check_divides(
                "hidden_size",
                self.hidden_size,
                over="num_heads",
                parts=self.num_heads,
                error=ModelError,
                fix="choose num_heads that divides hidden_size, or give head_size.",
            )
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.ffn_size:
            wide = 4 * self.hidden_size
            # Two matrices into the feed-forward instead of one: 2/3 of the width keeps the number of parameters
            # (Shazeer 2020, section 3), rounded up to 64 as in Llama.
            thin = -(-8 * self.hidden_size // 3 // 64) * 64
            object.__setattr__(self, "ffn_size", wide if self.mlp == "gelu" else thin)
        if self.latent_size and not self.value_head_size:
            # As in DeepSeek-V2 and V3.
            object.__setattr__(self, "value_head_size", self.head_size - self.rope_head_size)
        if self.num_experts and not self.expert_size:
            object.__setattr__(self, "expert_size", self.ffn_size)

    def expert_rows(self, num_tokens: int) -> int:
        """Return the rows of each expert in one round for so many tokens of a device; never more than tokens."""
        mean = num_tokens * self.experts_per_token / self.num_experts
        return max(1, min(math.ceil(self.expert_capacity * mean), num_tokens))

    @property
    def qkv_bias(self) -> Literal["on", "off"]:
        """Whether the projections to queries, keys and values have a bias."""
        return "off" if self.bias == "off" else "on"

    @property
    def other_bias(self) -> Literal["on", "off"]:
        """Whether all other linear layers, and LayerNorms, have a bias."""
        return "on" if self.bias == "on" else "off"

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a gate beside the layer up."""
        return self.mlp != "gelu"

    @property
    def moves_router_bias(self) -> bool:
        """Whether training moves a bias of each expert to even out the load; under adapters it is frozen."""
        return self.router_bias == "on" and not self.lora_rank

    @property
    def num_block_norms(self) -> int:
        """Number of norms of a block's inputs and outputs."""
        return 4 if self.norm_place == "both" else 2

    @property
    def can_be_fused(self) -> bool:
        """Whether cuDNN's flash attention supports this dtype and head size, of wide heads on GPUs from Hopper on.

        It has no caps of scores.
        """
        if self.dtype != "bfloat16" or self.attention_softcap:
            return False
        if self.latent_size and self.value_head_size != self.head_size:
            return (self.head_size, self.value_head_size) == _LATENT_HEADS
        return self.head_size % 8 == 0 and self.head_size <= LARGEST_WIDE_HEAD

    @property
    def has_wide_heads(self) -> bool:
        """Whether heads are wider than every GPU's kernel takes, or keys wider than values."""
        return self.head_size > LARGEST_FUSED_HEAD or bool(self.latent_size and self.value_head_size != self.head_size)

    @property
    def rotated_size(self) -> int:
        """Features of each head that rotary positions turn."""
        return self.rope_head_size or self.head_size

    @property
    def query_size(self) -> int:
        """Features of all query heads together, num_heads x head_size."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Features of all key (or value) heads together, num_kv_heads x head_size."""
        return self.num_kv_heads * self.head_size

    @property
    def value_size(self) -> int:
        """Features of what all heads return together, num_heads x the size of a value head."""
        return self.num_heads * (self.value_head_size or self.head_size)
