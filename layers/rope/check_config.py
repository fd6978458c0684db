"""Check the settings of rotary positions."""

import math
from dataclasses import fields
from typing import Any

from ...meshes import ModelError

_OF_TURNS = ("rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_tokens")
_OF_YARN = ("rope_mscale_all", "rope_truncate")
_OF_LONGROPE = ("rope_short_factors", "rope_long_factors")
_OF_ROPE = ("rope_theta", *_OF_TURNS, *_OF_YARN, "rope_head_size")


def check_rope(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about rotary positions agree.

    Raises:
        ModelError: features to rotate are odd, too many or none, a number is out of bounds, or a field is given without
            the positions or the scaling that it is for.
    """
    if config.positions != "rotary":
        _refuse(config, _OF_ROPE, needs="positions", value="rotary", what="rotary positions")
    elif config.rotated_size % 2:
        name = "rope_head_size" if config.rope_head_size else "head_size"
        raise ModelError(
            f"{name}={config.rotated_size} is odd, and rotary positions turn pairs of features.",
            fix=f"set {name}={config.rotated_size + 1}, or positions='learned'.",
        )
    if not 0 <= config.rope_head_size <= config.head_size:
        raise ModelError(
            f"rope_head_size={config.rope_head_size} features of a head are turned, of head_size={config.head_size}.",
            fix=f"set rope_head_size from 1 to {config.head_size}, or leave it out for all.",
        )
    _check_scaling(config)


def _check_scaling(config: Any) -> None:
    kind = config.rope_scaling
    if kind == "none" and config.rope_factor != 1:
        raise ModelError(
            f"rope_factor={config.rope_factor} says to scale rotary positions, but rope_scaling='none'.",
            fix="set rope_scaling='linear', 'dynamic', 'llama3', 'yarn' or 'longrope', or leave rope_factor out.",
        )
    if kind != "none" and config.positions != "rotary":
        raise ModelError(
            f"rope_scaling={kind!r}, but positions={config.positions!r} are not rotary.",
            fix="set positions='rotary', or leave rope_scaling out.",
        )
    if kind != "yarn":
        # LongRoPE has this one too.
        own = _OF_YARN if kind == "longrope" else (*_OF_YARN, "rope_attention_factor")
        _refuse(config, own, needs="rope_scaling", value="yarn", what="YaRN")
    if kind == "longrope":
        _check_longrope(config)
    else:
        _refuse(config, _OF_LONGROPE, needs="rope_scaling", value="longrope", what="LongRoPE")
    if kind in ("llama3", "yarn") and config.rope_original_tokens < 1:
        raise ModelError(
            f"rope_original_tokens={config.rope_original_tokens}: rope_scaling={kind!r} compares wavelengths with the "
            "length that the model was first trained on.",
            fix="set rope_original_tokens, 8192 for Llama 3, 4096 for DeepSeek-V3.",
        )
    if kind == "dynamic" and not 0 < config.max_tokens <= config.rope_original_tokens:
        raise ModelError(
            f"max_tokens={config.max_tokens}: rope_scaling='dynamic' turns sequences of up to "
            f"rope_original_tokens={config.rope_original_tokens} as if it were not there; trellax computes no longer "
            "ones, whose frequencies would change with each token.",
            fix="set max_tokens to at most rope_original_tokens, or rope_scaling='yarn' to train for longer ones.",
        )
    if kind in ("llama3", "yarn"):
        _check_turns(config)
    if kind == "yarn":
        _check_yarn(config)


def _check_longrope(config: Any) -> None:
    for name in _OF_LONGROPE:
        factors, pairs = getattr(config, name), config.rotated_size // 2
        are_numbers = isinstance(factors, tuple) and all(isinstance(one, int | float) for one in factors)
        if not are_numbers or len(factors) != pairs or not all(0 < one < math.inf for one in factors):
            raise ModelError(
                f"{name} has {len(factors) if isinstance(factors, tuple) else repr(factors)} factors: "
                f"rope_scaling='longrope' divides each of {pairs} frequencies by one of its own, above 0.",
                fix=f"give {pairs} numbers above 0, as `short_factor` and `long_factor` of the model's config.json.",
            )
    if config.rope_original_tokens < 2:
        raise ModelError(
            f"rope_original_tokens={config.rope_original_tokens}: rope_scaling='longrope' has other factors for "
            "sequences that are longer than those that the model was first trained on.",
            fix="set rope_original_tokens, 4096 for Phi-3 and Phi-4-mini.",
        )
    for name in ("attention_pattern", "latent_size"):
        if value := getattr(config, name):
            raise ModelError(
                f"{name}={value} with rope_scaling='longrope': its layers take no factors by the length of a sequence.",
                fix=f"leave {name} out, or set rope_scaling='yarn'.",
            )


def _refuse(config: Any, names: tuple[str, ...], *, needs: str, value: str, what: str) -> None:
    """Raise if a field is given that is for another choice."""
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise ModelError(
                f"{field.name}={getattr(config, field.name)!r} is for {what}, but {needs}={getattr(config, needs)!r}.",
                fix=f"set {needs}={value!r}, or leave {field.name} out.",
            )


def _check_turns(config: Any) -> None:
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    if not 0 < low < high:
        raise ModelError(
            f"rope_low_frequency_factor={low} and rope_high_frequency_factor={high}: between them lie the "
            f"wavelengths that are scaled in part, so 0 < {low} < {high} must hold.",
            fix="set 1 and 4 for llama3, or 1 and 32 for yarn.",
        )


def _check_yarn(config: Any) -> None:
    if config.rope_high_frequency_factor == 4:
        raise ModelError(
            "rope_high_frequency_factor=4 is Llama 3's, but rope_scaling='yarn', which keeps pairs from 32 turns on.",
            fix="set rope_high_frequency_factor=32.",
        )
    if config.rope_theta <= 1:
        raise ModelError(
            f"rope_theta={config.rope_theta}: YaRN takes its logarithm, to find pairs by their turns.",
            fix="set rope_theta above 1, 10000 say.",
        )
