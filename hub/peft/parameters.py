"""Read adapters that PEFT has for a parameter of all experts (`target_parameters`) as an adapter of each expert.

transformers 5 holds the experts of a layer in two parameters, gate_up [E, 2F, D] and down [E, D, F]. PEFT gives each of
them one A and one B, in which ranks are those of all experts: its `ParamWrapper` (version 0.21) adds to expert e

    sum over r of B[:, r, e] A[e, r, :]       A [E r, in] read as [E, r, in], B [out, r E] read as [out, r, E]

Rows of B of gate_up are those of gate, and then those of up, so each of the two has its own B and the same A. That is
exact, and takes A twice.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...layers.lora.linears import Linear
from ..adapters import node_at
from .names import ENDS, AdaptedLayer

_A, _B = ENDS["lora_a"], ENDS["lora_b"]
_OF_EXPERTS = re.compile(r".*\.layers\.(\d+)\.\w+\.experts(?:\.base_layer)*" + re.escape(_A))
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_JOINED = (("mlp.experts.gate", "mlp.experts.up"), ("mlp.experts.down",))
"""Linear layers of experts in the order in which one parameter holds them."""


def split_experts(tensors: Mapping[str, np.ndarray], layers: Sequence[AdaptedLayer], shapes: Any) -> dict[str, Any]:
    """Return the tensors of a file with those of a parameter of all experts replaced by those of each expert.

    Tensors of another shape than the adapter of such a parameter has are left as they are.

    Args:
        layers: all linear layers of the model.
        shapes: shapes of its parameters, a tree {"embed", "blocks", "head"}.
    """
    of_experts = {own.kernel.linear.name: own for own in layers if own.kernel.linear.copies > 1}
    names = {name: _names_by_layer(own, shapes) for name, own in of_experts.items()}
    found = dict(tensors)
    for name, a in tensors.items():
        match, name_of_b = _OF_EXPERTS.fullmatch(name), name.removesuffix(_A) + _B
        if match is None or name_of_b not in tensors:
            continue
        for joined in _JOINED:
            own = [of_experts[one].kernel.linear for one in joined if one in of_experts]
            places = [names[one.name].get(int(match[1])) for one in own]
            if own and all(places) and _fits(a, tensors[name_of_b], own):
                del found[name], found[name_of_b]
                found |= _split(a, tensors[name_of_b], places)
    return found


def _names_by_layer(own: AdaptedLayer, shapes: Any) -> dict[int, list[str]]:
    """Return the names, without ends, of the adapters of a linear layer of experts, by the number of the layer."""
    found: dict[int, list[str]] = {}
    for number in own.numbers(node_at(shapes, own.kernel.path)["kernel"].shape):
        name = own.tensor_name(number, "")
        layer = _LAYER.search(name)
        assert layer is not None, name
        found.setdefault(int(layer[1]), []).append(name)
    return found


def _fits(a: np.ndarray, b: np.ndarray, own: Sequence[Linear]) -> bool:
    """Return whether A and B adapt linear layers that are joined: in sizes, gate_up and down always differ."""
    ranks = a.shape[0]
    is_of_experts = ranks % own[0].copies == 0
    return is_of_experts and a.shape == (ranks, own[0].num_in) and b.shape == (sum(one.num_out for one in own), ranks)


def _split(a: np.ndarray, b: np.ndarray, places: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return A and B of each expert of each linear layer, by the names in `places`."""
    num_experts = len(places[0])
    a_Eri = a.reshape(num_experts, -1, a.shape[1])
    b_orE = b.reshape(len(places), b.shape[0] // len(places), -1, num_experts)
    return {
        f"{name}{end}": part
        for row, names in enumerate(places)
        for expert, name in enumerate(names)
        for end, part in ((_A, a_Eri[expert]), (_B, b_orE[row, ..., expert]))
    }
