"""Folders with a model in them, from Hugging Face or from a run: read onto a mesh, and written back."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .config import HubModel, read_hub_model
    from .read import read_weights
    from .tokenizer import ModelTokenizer, load_tokenizer
    from .write import write_weights

__all__ = [
    "HubModel",
    "ModelTokenizer",
    "load_tokenizer",
    "read_hub_model",
    "read_weights",
    "write_weights",
]

make_lazy(__name__)
