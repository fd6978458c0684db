"""Check the fields of a `ModelConfig` that name classes of the user's, without an import of them."""

import re
from collections.abc import Mapping
from typing import Any

from ...meshes import ModelError
from ...meshes.errors import shown, suggest

OWN_CLASSES = ("block", "mlp_class", "norm_class", "attention_class")
"""Fields of a `ModelConfig` that name a class as "module:Class", "" for ours."""

OWN_FIELDS = (*OWN_CLASSES, "dims")
"""All fields of a `ModelConfig` that are about classes of the user's."""

_PATH = re.compile(r"(?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*")
_NAME = re.compile(r"[^\W\d]\w*")
_ROLES = ("tensor", "none")

_OF_ATTENTION = ("attention_pattern", "attention_softcap", "attention_scale", "attention_sinks")

_EXCLUDED = {
    "block": ("mlp_class", "norm_class", "attention_class", "num_experts", "latent_size", "lora_rank", *_OF_ATTENTION),
    "mlp_class": ("num_experts", "lora_rank"),
    "norm_class": ("lora_rank",),
    "attention_class": ("latent_size", "lora_rank", *_OF_ATTENTION),
}
"""Fields that say nothing of a layer that a class replaces, or that the layers of a class may not support."""


def has_own_classes(config: Any) -> bool:
    """Return whether a `ModelConfig` names a class of the user's."""
    return any(getattr(config, name) for name in OWN_CLASSES)


def own_dims(config: Any) -> Mapping[str, str]:
    """Return what each of `config.dims` is split over, "tensor" or "none", by its name."""
    return {name: role for name, _, role in (entry.partition("=") for entry in config.dims)}


def check_own(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about classes of the user's agree.

    Raises:
        ModelError: a class is not written as module:Class, a dim as name=tensor or name=none, or a field says something
            of a layer that a class replaces.
    """
    for name in OWN_CLASSES:
        _check_path(name, getattr(config, name))
        for other in _EXCLUDED[name] if getattr(config, name) else ():
            if getattr(config, other) not in ("", 0, 0.0, (), "off"):
                raise ModelError(
                    f"{name}={getattr(config, name)!r} with {other}={getattr(config, other)!r}: the class takes the "
                    "place of what the other is about, or does not have it.",
                    fix=f"leave {other} out.",
                )
    _check_dims(config)


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str) or (value and not _PATH.fullmatch(value)):
        raise ModelError(
            f"{name}={shown(value)} is not a class of a module.",
            fix=f'write module:Class, {name}="my_package.blocks:MyClass" say.',
        )


def _check_dims(config: Any) -> None:
    fix = 'write name=tensor or name=none: dims=["inner=tensor"].'
    if not isinstance(config.dims, tuple) or not all(isinstance(entry, str) for entry in config.dims):
        raise ModelError(f"dims={shown(config.dims)} is not a tuple of texts.", fix=fix)
    for entry in config.dims:
        name, _, role = entry.partition("=")
        if not _NAME.fullmatch(name) or role not in _ROLES:
            raise ModelError(f"dims has {shown(entry)}, which is no dim.{suggest(role, _ROLES)}", fix=fix)
    if config.dims and not has_own_classes(config):
        raise ModelError(
            f"dims={shown(list(config.dims))} names dims of classes of your own, and there are none.",
            fix="leave dims out, or set block, mlp_class, norm_class or attention_class.",
        )
