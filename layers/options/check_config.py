"""Check the choices that a few architectures make."""

from dataclasses import fields
from typing import Any

from ...meshes import ModelError
from ...meshes.errors import suggest

FULL, WINDOW, UNROTATED = "full", "window", "unrotated"
"""Kinds of attention of a layer, see `by_layer.py`."""

SHARPNESS, CLAMP = 1.702, 7.0
"""Of the clamped SwiGLU: the factor within its sigmoid, with which x sigmoid(x) is near GELU, and the largest input."""

_FACTORS = ("embedding_scale", "residual_scale", "logit_scale")
_CAPS = ("attention_softcap", "logit_softcap")

OPTION_FIELDS = ("norm_place", *_FACTORS, "attention_scale", "attention_pattern", "window_rope_theta", *_CAPS)
OPTION_FIELDS += ("attention_sinks",)
"""Fields of a `ModelConfig` that most architectures have at their defaults."""


def options_of(config: Any) -> dict[str, tuple[Any, Any]]:
    """Return the value and the default of each of these fields."""
    defaults = {field.name: field.default for field in fields(config)}
    return {name: (getattr(config, name), defaults[name]) for name in OPTION_FIELDS}


def attention_kinds(config: Any) -> tuple[str, ...]:
    """Return the kind of attention of every layer of a model with a pattern."""
    pattern = config.attention_pattern
    return tuple(pattern[layer % len(pattern)] for layer in range(config.num_layers))


def windows_of_layers(config: Any) -> tuple[int, ...]:
    """Return the window of every layer, 0 for all tokens before."""
    if not config.attention_pattern:
        return (config.attention_window,) * config.num_layers
    return tuple(config.attention_window if kind == WINDOW else 0 for kind in attention_kinds(config))


def check_options(config: Any) -> None:
    """Raise unless the choices of a `ModelConfig` that are explained in this folder agree with its other fields.

    Raises:
        ModelError: a factor is not above 0, a pattern has unknown kinds or no use, or a choice is given that attention
            from latent vectors does not have.
    """
    for name in _FACTORS:
        if not getattr(config, name) > 0:
            raise ModelError(f"{name}={getattr(config, name)} must be above 0.", fix=f"leave {name} out, for 1.")
    for name in ("attention_scale", "attention_softcap", "attention_pattern", "attention_sinks"):
        if config.latent_size and (value := getattr(config, name)) not in (0.0, (), "off"):
            raise ModelError(
                f"{name}={value!r} with latent_size={config.latent_size}: attention from latents does not have it.",
                fix=f"leave {name} out.",
            )
    if config.mlp == "geglu" and config.num_experts:
        raise ModelError(
            f"mlp='geglu' with num_experts={config.num_experts}: experts have SwiGLU or GELU.", fix="set mlp='swiglu'."
        )
    _check_pattern(config)


def _check_pattern(config: Any) -> None:
    pattern, known = config.attention_pattern, (FULL, WINDOW, UNROTATED)
    if not isinstance(pattern, tuple):
        raise ModelError(f"attention_pattern={pattern!r} is not a tuple of kinds.", fix=f"name {', '.join(known)}.")
    for kind in pattern:
        if kind not in known:
            raise ModelError(
                f"attention_pattern has {kind!r}, which is no kind of attention.{suggest(str(kind), known)}",
                fix=f"name some of {', '.join(known)}.",
            )
    if pattern and (config.attention_window > 0) != (WINDOW in pattern):
        raise ModelError(
            f"attention_window={config.attention_window} with attention_pattern={pattern}: the window is that of "
            f"layers of the kind {WINDOW!r}.",
            fix=f"give both attention_window and a layer {WINDOW!r} in the pattern, or neither.",
        )
    if UNROTATED in pattern and config.positions != "rotary":
        raise ModelError(
            f"attention_pattern has {UNROTATED!r}, but positions={config.positions!r} rotate no layer.",
            fix=f"set positions='rotary', or {FULL!r} in the pattern.",
        )
    if config.window_rope_theta and not (config.window_rope_theta > 0 and WINDOW in pattern):
        raise ModelError(
            f"window_rope_theta={config.window_rope_theta} with attention_pattern={pattern}: it is the base of rotary "
            f"positions in layers of the kind {WINDOW!r}, above 0.",
            fix="leave window_rope_theta out.",
        )
