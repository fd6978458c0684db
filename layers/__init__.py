"""Transformer layers that know logical dimensions, never mesh axes."""

from .attention import Attention
from .block import Block, Remat, rematerialize, run_blocks, stack_blocks
from .config import ModelConfig
from .embedding import Embedding, lookup
from .linear import ColumnLinear, RowLinear, make_param
from .loss import cross_entropy
from .mlp import MLP
from .norms import make_norm
from .rotary import rotate
from .transformer import Head, Transformer, model_rules, param_dims

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "ColumnLinear",
    "Embedding",
    "Head",
    "ModelConfig",
    "Remat",
    "RowLinear",
    "Transformer",
    "cross_entropy",
    "lookup",
    "make_norm",
    "make_param",
    "model_rules",
    "param_dims",
    "rematerialize",
    "rotate",
    "run_blocks",
    "stack_blocks",
]
