"""Inference: prefill, pipelined decode, sampling and continuous batching, on the mesh a model was trained on."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .async_engine import AsyncEngine, TokenStream
    from .check import check_model, check_request
    from .constraints.constraint import Constraint
    from .engine import Engine
    from .load import load_for_serving, quantize_params
    from .params import param_shapes
    from .requests import FinishReason, Request, ServedSequence, TokenLogprobs
    from .results import Completion, Usage
    from .speculation.speculate import Speculation
    from .state import Sizes

__all__ = [
    "AsyncEngine",
    "Completion",
    "Constraint",
    "Engine",
    "FinishReason",
    "Request",
    "ServedSequence",
    "Sizes",
    "Speculation",
    "TokenLogprobs",
    "TokenStream",
    "Usage",
    "check_model",
    "check_request",
    "load_for_serving",
    "param_shapes",
    "quantize_params",
]

make_lazy(__name__)
