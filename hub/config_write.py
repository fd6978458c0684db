"""Write a `ModelConfig` as the config.json of a Hugging Face model, in the architecture that can hold it.

Read `write.py` for the weights beside it.
"""

from typing import Any

from ..layers import ModelConfig
from ..meshes import WeightsError, suggest
from .architectures import ARCHITECTURES


def hub_values(config: ModelConfig, *, architecture: str | None = None) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        architecture: its `model_type`; the only one that can hold the model if left out.

    Raises:
        WeightsError: no architecture, or not the one asked for, can hold the model, or several can.
    """
    lacks = {name: list(one.lacks(config)) for name, one in ARCHITECTURES.items()}
    if architecture is not None and architecture not in lacks:
        raise WeightsError(
            f"architecture {architecture!r} is not known.{suggest(architecture, lacks)}",
            fix=f"use one of {', '.join(lacks)}.",
        )
    fitting = [name for name in lacks if not lacks[name]]
    if architecture is None and len(fitting) > 1:
        raise WeightsError(
            f"the model is the same as {' and as '.join(fitting)}.", fix=f"say which with --architecture {fitting[0]}."
        )
    if architecture is None and not fitting:
        reasons = [f"{name}: {', '.join(reason)}" for name, reason in lacks.items()]
        raise WeightsError("\n  ".join(["no Hugging Face architecture holds this model:", *reasons]))
    name = architecture or fitting[0]
    if lacks[name]:
        raise WeightsError("\n  ".join([f"{name} cannot hold this model:", *lacks[name]]))
    chosen = ARCHITECTURES[name]
    return {"architectures": [chosen.class_name], "model_type": name} | chosen.write(config)
