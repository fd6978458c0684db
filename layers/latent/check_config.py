"""Check the sizes and choices of attention from latent vectors."""

from typing import Any

from ...meshes import ModelError

_SIZES = ("latent_size", "query_latent_size", "value_head_size")


def check_latents(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about latent vectors agree.

    Raises:
        ModelError: a size is negative, or given without latents, a head has no rotated or no other features, or a
            choice is given that this attention does not have.
    """
    for name in _SIZES:
        if getattr(config, name) < 0:
            raise ModelError(
                f"{name}={getattr(config, name)} is negative.", fix=f"leave {name} out, or set it above 0."
            )
    if not config.latent_size:
        for name in _SIZES[1:]:
            if getattr(config, name):
                raise ModelError(
                    f"{name}={getattr(config, name)}, but latent_size=0: keys and values come from no latent vector.",
                    fix=f"set latent_size=512, say, or leave {name} out.",
                )
        return
    wanted = {"positions": "rotary", "bias": "off", "qk_norm": "off", "matmuls": "plain"}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ModelError(
                f"{name}={getattr(config, name)!r} with latent_size={config.latent_size}: attention from latent "
                f"vectors has {name}={value!r} alone.",
                fix=f"set {name}={value!r}.",
            )
    if config.num_kv_heads != config.num_heads:
        raise ModelError(
            f"num_kv_heads={config.num_kv_heads} of num_heads={config.num_heads}: with latent_size="
            f"{config.latent_size} every head has keys and values of its own.",
            fix="leave num_kv_heads out.",
        )
    if not 0 < config.rope_head_size < config.head_size:
        raise ModelError(
            f"rope_head_size={config.rope_head_size} of head_size={config.head_size}: with latent_size="
            f"{config.latent_size} a head has features that are rotated, whose keys all heads share, and others.",
            fix=f"set rope_head_size from 2 to {config.head_size - 1}; in DeepSeek-V3 64 of 192.",
        )
