"""Transformer layers that know logical dimensions, never mesh axes."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .attention import Attention
    from .block import Block, Remat, rematerialize, run_blocks, stack_blocks
    from .cache import CacheDtype, KVCache, NewTokens, bytes_per_device, cache_shapes
    from .config import ModelConfig
    from .counts import ActivationBytes, FlopCounts, ParamCounts, activation_bytes, flops_per_token, param_counts
    from .embedding import Embedding, lookup
    from .linear import ColumnLinear, RowLinear, make_param
    from .loss import cross_entropy, projected_cross_entropy
    from .mlp import MLP
    from .norms import make_head_norm, make_norm, normalize
    from .partitioning import init_model, place_model
    from .rotary import rope_frequencies, rotate
    from .transformer import Head, Transformer, model_rules, param_dims

__all__ = [
    "MLP",
    "ActivationBytes",
    "Attention",
    "Block",
    "CacheDtype",
    "ColumnLinear",
    "Embedding",
    "FlopCounts",
    "Head",
    "KVCache",
    "ModelConfig",
    "NewTokens",
    "ParamCounts",
    "Remat",
    "RowLinear",
    "Transformer",
    "activation_bytes",
    "bytes_per_device",
    "cache_shapes",
    "cross_entropy",
    "flops_per_token",
    "init_model",
    "lookup",
    "make_head_norm",
    "make_norm",
    "make_param",
    "model_rules",
    "normalize",
    "param_counts",
    "param_dims",
    "place_model",
    "projected_cross_entropy",
    "rematerialize",
    "rope_frequencies",
    "rotate",
    "run_blocks",
    "stack_blocks",
]

make_lazy(__name__)
