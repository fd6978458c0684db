"""Which linear layers of a model have adapters, and the checks of that choice."""

from dataclasses import dataclass
from typing import Any, Literal

from ...meshes import ModelError
from ...meshes.errors import suggest
from .frozen_kernels import check_base

ATTENTION_TARGETS = ("query", "key", "value", "out")
TARGETS = (*ATTENTION_TARGETS, "gate", "up", "down")
"""Layers that may have an adapter, by the names of their parameters."""

ADAPTERS = ("lora_a", "lora_b")
"""Names of the matrices of an adapter, [in, r] and [r, out]."""

MAGNITUDE = "lora_m"
"""Name of the magnitudes of a layer's columns, [out]."""

TRAINED = (*ADAPTERS, MAGNITUDE)
"""Names of all parameters of an adapter."""

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets", "lora_magnitude", "lora_base")
"""Fields of a `ModelConfig` that are about adapters."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter of one linear layer, whose kernel is frozen: y = x W + scale (x A) B.

    rank: features between A and B; 0 for a frozen layer without an adapter.
    scale: alpha / rank.
    magnitude: whether the length of each column is trained apart from its direction, as DoRA does.
    base: whether the kernel is held in the compute dtype ("plain") or in four bits, see `nf4.py`.
    """

    rank: int
    scale: float
    magnitude: Literal["off", "on"] = "off"
    base: Literal["plain", "nf4"] = "plain"


def lora_of(config: Any, target: str) -> Lora | None:
    """Return the adapter of a layer by its name in `TARGETS`, None in a model without adapters."""
    if not config.lora_rank:
        return None
    rank = config.lora_rank if target in lora_targets(config) else 0
    return Lora(rank=rank, scale=lora_scale(config), magnitude=config.lora_magnitude, base=config.lora_base)


def lora_scale(config: Any) -> float:
    """Return alpha / rank; alpha is the rank if it is left out."""
    return (config.lora_alpha or config.lora_rank) / config.lora_rank


def lora_targets(config: Any) -> tuple[str, ...]:
    """Return the layers that have adapters: those of the config, or all that the model has; in the order of TARGETS."""
    known = [name for name in TARGETS if name != "gate" or config.is_gated]
    return tuple(name for name in known if name in (config.lora_targets or known))


def check_lora(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about adapters agree.

    Raises:
        ModelError: the rank is negative, fields are given without one, a target is unknown or not in the model, or the
            model has layers that adapters do not support.
    """
    _check_given(config)
    check_base(config)
    if not config.lora_rank:
        return
    for name in config.lora_targets:
        _check_target(name, mlp=config.mlp)
    for name, what in {"num_experts": "a mixture of experts", "latent_size": "attention from latent vectors"}.items():
        if getattr(config, name):
            raise ModelError(
                f"lora_rank={config.lora_rank} with {name}={getattr(config, name)}: there are no adapters for {what}.",
                fix="set lora_rank=0, to train all weights.",
            )


def _check_given(config: Any) -> None:
    if config.lora_rank < 0:
        raise ModelError(f"lora_rank={config.lora_rank} is negative.", fix="set it to 8, say, or 0 for no adapters.")
    if not isinstance(config.lora_targets, tuple) or not all(isinstance(name, str) for name in config.lora_targets):
        raise ModelError(f"lora_targets={config.lora_targets!r} is not a tuple of names.", fix=f"name {_listed()}.")
    for name in ("lora_alpha", "lora_targets"):
        if getattr(config, name) and not config.lora_rank:
            raise ModelError(
                f"{name}={getattr(config, name)}, but lora_rank=0: the model has no adapters.",
                fix=f"set lora_rank=8, say, or leave {name} out.",
            )
    if config.lora_magnitude == "on" and not config.lora_rank:
        raise ModelError(
            "lora_magnitude='on', but lora_rank=0: the model has no adapters.",
            fix="set lora_rank=8, say, or leave lora_magnitude out.",
        )


def _check_target(name: str, *, mlp: str) -> None:
    if name not in TARGETS:
        raise ModelError(
            f"lora_targets has {name!r}, which is no linear layer of a block.{suggest(name, TARGETS)}",
            fix=f"name some of {_listed()}, or leave it out for all.",
        )
    if name == "gate" and mlp == "gelu":
        raise ModelError(
            f"lora_targets has 'gate', but mlp={mlp!r} has none.", fix="leave gate out, or set mlp='swiglu'."
        )


def _listed() -> str:
    return ", ".join(TARGETS)
