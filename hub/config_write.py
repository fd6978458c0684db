"""Convert a `ModelConfig` to the config.json of a Hugging Face model, of an architecture that supports all its fields.

Read `write.py` for the weights beside it.
"""

from typing import Any

from ..layers import ModelConfig
from ..meshes import WeightsError
from ..meshes.errors import suggest
from .architectures import ARCHITECTURES


def hub_values(config: ModelConfig, *, architecture: str | None = None) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        architecture: the `model_type` to write; the one that supports the model if left out.

    Raises:
        WeightsError: the architecture is unknown, or it, or any, does not support the model, or several do.
    """
    unsupported = {name: list(one.find_unsupported_fields(config)) for name, one in ARCHITECTURES.items()}
    if architecture is not None and architecture not in unsupported:
        raise WeightsError(
            f"architecture {architecture!r} is not known.{suggest(architecture, unsupported)}",
            fix=f"use one of {', '.join(unsupported)}.",
        )
    fitting = [name for name in unsupported if not unsupported[name] and ARCHITECTURES[name].has_use(config)]
    if architecture is None and len(fitting) > 1:
        raise WeightsError(
            f"the model is the same as {' and as '.join(fitting)}.", fix=f"say which with --architecture {fitting[0]}."
        )
    if architecture is None and not fitting:
        reasons = [f"{name}: {', '.join(reason)}" for name, reason in unsupported.items()]
        raise WeightsError("\n  ".join(["no Hugging Face architecture holds this model:", *reasons]))
    name = architecture or fitting[0]
    if unsupported[name]:
        raise WeightsError("\n  ".join([f"{name} cannot hold this model:", *unsupported[name]]))
    chosen = ARCHITECTURES[name]
    return {"architectures": [chosen.class_name], "model_type": name} | chosen.write(config)
