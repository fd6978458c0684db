"""Check the sizes and choices of a mixture of experts."""

from dataclasses import fields
from typing import Any

from ...meshes import ModelError
from ...meshes.divisibility import check_divides

_ONLY_WITH_EXPERTS = (
    "experts_per_token",
    "expert_size",
    "shared_size",
    "dense_layers",
    "balance_loss",
    "router_z_loss",
)
_FACTORS = ("expert_capacity", "router_scale", "router_bias_rate")
_CHOICES = (
    "expert_overflow",
    "router",
    "router_normalize",
    "router_groups",
    "router_groups_kept",
    "router_bias",
)
EXPERT_FIELDS = ("num_experts", *_ONLY_WITH_EXPERTS, *_FACTORS, *_CHOICES)
"""Fields of a `ModelConfig` that a model without experts has at their defaults."""


def check_experts(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about experts agree.

    Raises:
        ModelError: a size is negative, a token uses more experts than there are, groups do not divide them, no layer is
            left for them, or a field is given without experts.
    """
    _check_signs(config)
    _check_groups(config)
    if not config.num_experts:
        defaults = {field.name: field.default for field in fields(config)}
        for name in EXPERT_FIELDS:
            if (value := getattr(config, name)) != defaults[name]:
                raise ModelError(
                    f"{name}={value}, but num_experts=0: the model has no experts.",
                    fix=f"set num_experts=8 and experts_per_token=2, say, or leave {name} out.",
                )
        return
    if not 1 <= config.experts_per_token <= config.num_experts:
        raise ModelError(
            f"experts_per_token={config.experts_per_token} of num_experts={config.num_experts}: a token uses at least "
            "one, and no expert twice.",
            fix=f"set experts_per_token from 1 to {config.num_experts}.",
        )
    if config.dense_layers >= config.num_layers:
        raise ModelError(
            f"dense_layers={config.dense_layers} of num_layers={config.num_layers}: no layer is left for the experts.",
            fix=f"set dense_layers from 0 to {config.num_layers - 1}, or num_experts=0 for a dense model.",
        )
    if config.matmuls == "fp8":
        raise ModelError("matmuls='fp8' has no products for experts.", fix="set matmuls='plain'.")
    _check_choice(config)


def _check_signs(config: Any) -> None:
    for name in ("num_experts", *_ONLY_WITH_EXPERTS):
        if getattr(config, name) < 0:
            raise ModelError(
                f"{name}={getattr(config, name)} is negative.", fix=f"leave {name} out, or set it above 0."
            )
    for name in _FACTORS:
        if not getattr(config, name) > 0:
            raise ModelError(f"{name}={getattr(config, name)} must be above 0.", fix=f"leave {name} out.")


def _check_choice(config: Any) -> None:
    """Raise unless there are enough experts in the groups that a token keeps."""
    groups, kept = config.router_groups, config.router_groups_kept
    check_divides("num_experts", config.num_experts, over="router_groups", parts=groups, error=ModelError)
    if kept * config.num_experts // groups < config.experts_per_token:
        raise ModelError(
            f"router_groups_kept={kept} groups of {config.num_experts // groups} experts hold fewer than "
            f"experts_per_token={config.experts_per_token}.",
            fix="keep more groups.",
        )


def _check_groups(config: Any) -> None:
    groups, kept = config.router_groups, config.router_groups_kept
    if groups < 1:
        raise ModelError(f"router_groups={groups}: all experts are one group at least.", fix="set 1, for no groups.")
    if not 1 <= kept <= groups:
        raise ModelError(
            f"router_groups_kept={kept} of router_groups={groups}: a token chooses among at least one of them.",
            fix=f"set router_groups_kept from 1 to {groups}.",
        )
