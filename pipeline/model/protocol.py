"""What the functions of a model may ask for and return, beyond an activation and a loss.

    layer(params, x, microbatch) -> x                      the simple form
    layer(params, x, microbatch, info) -> x or Output      the full form

A function that has a parameter named `info` is given a `LayerInfo`: its place in the model, random keys, its state. A
layer that returns an `Output` adds to the loss, to metrics, and to statistics of its own. Read `stage.py` next.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from ...layers.own.protocol import LayerInfo, Output

__all__ = ["Given", "LayerInfo", "Output", "asks_for_info"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Given:
    """A microbatch, its number, and the info of the function that is given it; None where no function asks for it."""

    microbatch: Any
    number: jax.Array
    info: LayerInfo | None = None

    def at(self, index: int) -> "Given":
        """Return what a function outside of the stages is given: `first` at -1, `last` at -2."""
        if self.info is None:
            return self
        # Arithmetic keeps the marks of the axes over which it varies.
        place = self.info.index * 0 + index
        return replace(self, info=replace(self.info, index=place, stage=place, state=None))


def asks_for_info(fn: Callable[..., Any]) -> bool:
    """Return whether a function, or the one that it wraps (`functools.wraps`), has a parameter named `info`."""
    try:
        return "info" in inspect.signature(fn).parameters
    except (TypeError, ValueError):
        # Some callables, C functions among them, tell no signature.
        return False
