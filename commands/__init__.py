"""The command line: `registry.py` lists the commands, and each has a file."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .serving_source import load_for_serving

__all__ = ["load_for_serving"]

make_lazy(__name__)
