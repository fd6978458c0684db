"""Read models from run folders and Hugging Face folders onto a mesh, and write Hugging Face folders."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .architectures import ARCHITECTURES
    from .architectures.architecture import Architecture
    from .config import HubModel, read_hub_model
    from .load import load_model
    from .model_folder import ModelSource, load_params, open_model, read_model_config
    from .read import read_weights
    from .run_params import is_run_folder
    from .text_stream import ByteTokenizer, TextStream, Tokenizer
    from .tokenizer import ModelTokenizer, load_tokenizer
    from .write import write_weights

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ByteTokenizer",
    "HubModel",
    "ModelSource",
    "ModelTokenizer",
    "TextStream",
    "Tokenizer",
    "is_run_folder",
    "load_model",
    "load_params",
    "load_tokenizer",
    "open_model",
    "read_hub_model",
    "read_model_config",
    "read_weights",
    "write_weights",
]

make_lazy(__name__)
