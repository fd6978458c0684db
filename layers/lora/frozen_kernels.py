"""How the frozen kernels under adapters are held, and the checks of that choice. It imports no jax; `nf4.py` does."""

import math
from typing import Any

from ...meshes import ModelError

BLOCK = 64
"""Numbers that share a scale; fewer if the hidden size is no multiple of it."""

LEAST_BLOCK = 4
"""Fewest numbers of a block; it tells the dimension of blocks from the other one."""


def block_size(num_features: int) -> int:
    """Return how many numbers share a scale where kernels have so many features along their blocks.

    >>> block_size(4096), block_size(80)
    (64, 16)
    """
    return math.gcd(num_features, BLOCK)


def check_base(config: Any) -> None:
    """Raise unless frozen kernels of a `ModelConfig` can be held as `lora_base` says.

    Raises:
        ModelError: there are no adapters, or magnitudes, products in eight bits, or blocks that are too small.
    """
    if config.lora_base == "plain":
        return
    asked = f"lora_base={config.lora_base!r}"
    if not config.lora_rank:
        raise ModelError(
            f"{asked}, but lora_rank=0: only frozen kernels are held in four bits.",
            fix="set lora_rank=8, say, or lora_base='plain'.",
        )
    for name, plain in (("lora_magnitude", "off"), ("matmuls", "plain")):
        if getattr(config, name) != plain:
            raise ModelError(
                f"{asked} with {name}={getattr(config, name)!r}: not for kernels in four bits.",
                fix=f"set {name}={plain!r}, or lora_base='plain'.",
            )
    for name in ("hidden_size", "latent_size", "query_latent_size"):
        size = getattr(config, name)
        if size and block_size(size) < LEAST_BLOCK:
            raise ModelError(
                f"{asked} with {name}={size}: blocks of {block_size(size)} numbers, and a block has {LEAST_BLOCK} or "
                "more.",
                fix=f"use a {name.replace('_', ' ')} that is a multiple of {LEAST_BLOCK}, or lora_base='plain'.",
            )
