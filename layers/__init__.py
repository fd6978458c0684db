"""Transformer layers that know logical dimensions, never mesh axes."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .attention.attention import Attention
    from .attention.cache import KVCache, NewTokens, bytes_per_device
    from .block import Block, Remat
    from .config import ModelConfig
    from .counts import ActivationBytes, FlopCounts, ParamCounts, activation_bytes, flops_per_token, param_counts
    from .embedding import Embedding
    from .linear import ColumnLinear, RowLinear
    from .loss import cross_entropy
    from .mlp import MLP
    from .partitioning import init_model, place_model
    from .projected_loss import projected_cross_entropy
    from .transformer import Head, Transformer, model_rules, param_dims

__all__ = [
    "MLP",
    "ActivationBytes",
    "Attention",
    "Block",
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
    "cross_entropy",
    "flops_per_token",
    "init_model",
    "model_rules",
    "param_counts",
    "param_dims",
    "place_model",
    "projected_cross_entropy",
]

make_lazy(__name__)
