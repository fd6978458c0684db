"""Attention that differs from layer to layer: windows, and rotary positions, by a repeated pattern of kinds.

    attention_pattern ("window", "window", "full")      layer    0       1       2     3       4       5
                                                                 window  window  full  window  window  full

    full          all tokens before, rotated                                                      Llama
    window        the last `attention_window` tokens, rotated by `window_rope_theta` if given     Gemma 2 and 3
    unrotated     all tokens before, without rotary positions ("NoPE")                            SmolLM3

All layers have the same parameters, so they stay one stack, and what differs is data: a layer's number chooses among
frequencies, of which those of unrotated features are 0, and whether the window counts. Programs run one of two branches
of attention, each with a window known when it is compiled: work outside of it is skipped, as in models of one kind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes import ModelError
from ..config import ModelConfig
from ..rope.frequencies import rope_frequencies
from ..rope.magnitude import rope_magnitude
from .check_config import FULL, UNROTATED, WINDOW, attention_kinds

Result = TypeVar("Result")


class LayerAttention(NamedTuple):
    """What attention of one layer has of its own; None where it is that of all layers.

    is_windowed: whether the window of the config counts, bool [].
    frequencies: those of pairs of features, float32 [R/2]; magnitude: the factor of rotated features, float32 [].
    """

    is_windowed: Any = None
    frequencies: Any = None
    magnitude: Any = None


SAME_AS_ALL = LayerAttention()
"""A layer that has nothing of its own."""


def attention_of_layer(config: ModelConfig, layer: jax.Array | int | None) -> LayerAttention:
    """Return what a layer has of its own, by its number in the model.

    Raises:
        ModelError: layers differ and the number is not given.
    """
    if not config.attention_pattern:
        return SAME_AS_ALL
    if layer is None:
        raise ModelError(
            f"a layer of a model with attention_pattern={config.attention_pattern} was run without its number.",
            fix="give its number in the model, layer=0 for the first.",
        )
    kinds = np.array([(FULL, WINDOW, UNROTATED).index(kind) for kind in attention_kinds(config)])
    is_windowed = None if WINDOW not in config.attention_pattern else jnp.asarray(kinds == 1)[layer]
    if config.positions != "rotary" or (UNROTATED not in config.attention_pattern and not config.window_rope_theta):
        return LayerAttention(is_windowed=is_windowed)
    own, magnitude = rope_frequencies(config), rope_magnitude(config)
    size, theta = config.rotated_size, config.window_rope_theta
    local = (theta ** -(np.arange(0, size, 2) / size)).astype(np.float32) if theta else own
    frequencies = np.stack([own, local, np.zeros_like(own)])[kinds]
    magnitudes = np.array([magnitude, 1.0 if theta else magnitude, 1.0], np.float32)[kinds]
    return LayerAttention(is_windowed, jnp.asarray(frequencies)[layer], jnp.asarray(magnitudes)[layer])


def choose_window(is_windowed: jax.Array | None, window: int, run: Callable[..., Result], *operands: Any) -> Result:
    """Return run(window, *operands), or run(0, *operands) in a layer whose window does not count."""
    if is_windowed is None:
        return run(window, *operands)
    # Operands are arguments, not captured: kernels tell their residuals apart by identity.
    within, everything = (lambda *own, size=size: run(size, *own) for size in (window, 0))
    return jax.lax.cond(is_windowed, within, everything, *operands)
