"""Name the tensors of mixtures of experts, and read and check their settings in a config.json.

A published file has one tensor for each linear layer of an expert, [F, D]. transformers 5 holds all experts of a layer
in two tensors, gate and up side by side, and saves them so if it is asked to:

    ours                    published                     stacked
    gate.kernel [E, D, F]   experts.{expert}.gate [F, D]  experts.gate_up_proj [E, 2 F, D], part 0
    up.kernel   [E, D, F]   experts.{expert}.up   [F, D]  experts.gate_up_proj [E, 2 F, D], part 1
    down.kernel [E, F, D]   experts.{expert}.down [D, F]  experts.down_proj    [E, D, F]

Keys for the losses of routers change no logits and are ignored, as dropout is. Read `mixtral.py` next.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from .architecture import Values, take_first
from .llama_family import LLAMA_TENSORS
from .tensor_names import TensorNames, TensorPlace

_STACKED = "layers.{layer}.mlp."


def expert_tensors(module: str, *, gate: str, up: str, down: str) -> TensorNames:
    """Return the names of Llama's tensors with experts in place of the feed-forward layer.

    Args:
        module: name of the feed-forward layer in published files.
        gate, up, down: names of the linear layers of an expert there.
    """
    layer = f"layers.{{layer}}.{module}."
    names = {"gate": gate, "up": up, "down": down}
    published = {"router.weight": f"{layer}gate.weight"}
    published |= {f"{own}.kernel": f"{layer}experts.{{expert}}.{name}.weight" for own, name in names.items()}
    stacked = {
        "router.weight": _place(f"{_STACKED}gate.weight"),
        "gate.kernel": _place(f"{_STACKED}experts.gate_up_proj", part=0, num_parts=2),
        "up.kernel": _place(f"{_STACKED}experts.gate_up_proj", part=1, num_parts=2),
        "down.kernel": _place(f"{_STACKED}experts.down_proj"),
    }
    return replace(
        LLAMA_TENSORS,
        places={**LLAMA_TENSORS.places, **_of_blocks({own: _place(name) for own, name in published.items()})},
        stacked=_of_blocks(stacked),
    )


def resolve_experts(
    values: Values, warnings: list[str], *, names: tuple[str, str], defaults: Mapping[str, int]
) -> dict[str, Any]:
    """Return the sizes of experts, with transformers' defaults for those that are missing.

    Args:
        names: the two keys of the number of experts, the one that transformers 5 prefers first.
        defaults: default of each key; the number of experts under one of the two.
    """
    count = take_first(values, names, warnings)
    given = {key: count if key in names else values.get(key) for key in defaults}
    return {key: defaults[key] if value is None else value for key, value in given.items()}


def find_unsupported_experts(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each field of a model that Mixtral and Qwen 3's mixtures of experts cannot have."""
    if not config.num_experts:
        yield "model.num_experts=0, not 1 or more"
        return
    for size in ("shared_size", "dense_layers"):
        if value := getattr(config, size):
            yield f"model.{size}={value}, not 0"
    if config.router != "softmax":
        yield f"model.router={config.router!r}, not 'softmax'"
    if config.router_bias != "off":
        yield f"model.router_bias={config.router_bias!r}, not 'off'"
    if config.router_scale != 1:
        yield f"model.router_scale={config.router_scale}, not 1"
    if config.router_groups_kept != config.router_groups:
        yield f"model.router_groups_kept={config.router_groups_kept} of router_groups={config.router_groups}, not all"


def _place(name: str, *, part: int = 0, num_parts: int = 1) -> TensorPlace:
    return TensorPlace(name=name, layout="transposed", part=part, num_parts=num_parts)


def _of_blocks(places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    return {f"blocks.mlp.{own}": place for own, place in places.items()}
