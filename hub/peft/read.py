"""Read a PEFT folder: the config of its adapters, the folder of the weights that they adapt, and the adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ...layers import ModelConfig
from ...layers.lora.linears import HEAD
from ...meshes import WeightsError
from ...meshes.errors import shown
from ..adapters import adapter_shapes, node_at
from ..cached_folder import find_model_folder
from ..folder import find_file, read_json
from .names import CONFIG_FILE, ENDS, WEIGHTS_FILE, AdaptedLayer, adapted_layers, tensor_ends
from .parameters import split_experts

_REFUSED = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PeftFolder:
    """Adapters of a folder, which are not read yet.

    base: folder of the weights that they adapt.
    rank, alpha: those of all layers; what is added is alpha / rank x A B.
    magnitude: whether columns have magnitudes of their own, as DoRA's.
    """

    folder: Path
    base: Path
    rank: int
    alpha: float
    magnitude: Literal["off", "on"] = "off"


def is_peft_folder(folder: str | Path) -> bool:
    """Return whether a folder holds adapters in the files of PEFT, and no model of its own."""
    return (Path(folder) / CONFIG_FILE).exists() and not (Path(folder) / "config.json").exists()


def base_of(folder: str | Path) -> Path:
    """Return the folder of the weights that a folder's adapters adapt; a folder without adapters is its own.

    Raises:
        WeightsError: as `open_adapters` does.
    """
    return open_adapters(folder).base if is_peft_folder(folder) else Path(folder)


def open_adapters(folder: str | Path) -> PeftFolder:
    """Return what adapter_config.json says.

    Raises:
        WeightsError: it is broken, the adapters are of another kind than LoRA, or their base is not a folder here.
    """
    folder = Path(folder)
    values = read_json(folder, CONFIG_FILE)
    if not isinstance(values, Mapping):
        raise WeightsError(f"{folder / CONFIG_FILE} is no table.", fix="copy the file again.")
    mistakes = _find_mistakes(values)
    if mistakes:
        raise WeightsError("\n  ".join([f"{folder} has adapters that trellax does not read:", *mistakes]))
    base, rank, alpha = values.get("base_model_name_or_path"), values["r"], values["lora_alpha"]
    places = [find_model_folder(base), folder / base] if isinstance(base, str) and base else []
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise WeightsError(
            f"{folder} adapts base_model_name_or_path={shown(base)}, and there is no such folder here.",
            fix=f"download the model, and write its folder there in {CONFIG_FILE}.",
        )
    # rslora divides alpha by the root of the rank.
    scaled = alpha * rank**0.5 if values.get("use_rslora") else alpha
    magnitude: Literal["off", "on"] = "on" if values.get("use_dora") else "off"
    return PeftFolder(folder=folder, base=found, rank=rank, alpha=float(scaled), magnitude=magnitude)


def _find_mistakes(values: Mapping[str, Any]) -> list[str]:
    mistakes = [f"{name}={shown(values[name])}" for name in _REFUSED if values.get(name)]
    for name, wanted in {"peft_type": "LORA", "bias": "none"}.items():
        if values.get(name, wanted) != wanted:
            mistakes.append(f"{name}={shown(values[name])}, not {wanted!r}")
    if type(values.get("r")) is not int or values["r"] < 1:
        mistakes.append(f"r={shown(values.get('r'))}, not a whole number above 0")
    if type(values.get("lora_alpha")) not in (int, float) or not values["lora_alpha"] > 0:
        mistakes.append(f"lora_alpha={shown(values.get('lora_alpha'))}, not a number above 0")
    return mistakes


def read_adapters(opened: PeftFolder, config: ModelConfig, shapes: Any) -> tuple[ModelConfig, Any]:
    """Return the config of the model with these adapters, and the adapters, split as the kernels of `shapes` are.

    Args:
        config: the model of the base, without adapters.
        shapes: a tree {"embed", "blocks", "head"} of `jax.ShapeDtypeStruct` with shardings, blocks [L, ...].

    Raises:
        WeightsError: the file is broken, or its tensors are missing, unknown or of another shape.
    """
    every = replace(config, lora_rank=opened.rank, lora_alpha=opened.alpha, lora_magnitude=opened.magnitude)
    every = every if config.embeddings == "tied" else replace(every, lora_targets=("*", HEAD))
    ends = tensor_ends(every)
    tensors = split_experts(_load(opened.folder), adapted_layers(every, joined="leave out"), shapes)
    targets = _find_targets(tensors, every, shapes)
    model = replace(every, lora_targets=targets)
    wanted, layers = adapter_shapes(model, shapes), adapted_layers(model) if targets else ()
    names = {
        own.tensor_name(number, ends[param]): shape
        for own in layers
        for param, leaf in node_at(wanted, own.kernel.path).items()
        for shape in (own.turn(np.empty(leaf.shape[own.tensor.num_stacked :]), param).shape,)
        for number in own.numbers(leaf.shape)
    }
    mistakes = [f"{name} is no adapter of a layer of this model" for name in tensors if name not in names]
    mistakes += [f"{name} is missing" for name in names if name not in tensors]
    mistakes += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in names.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if mistakes or not layers:
        more = [f"and {len(mistakes) - _SHOWN} more"] if len(mistakes) > _SHOWN else []
        lines = [f"{opened.folder / WEIGHTS_FILE} does not fit the model in {opened.base}:", *mistakes[:_SHOWN], *more]
        raise WeightsError("\n  ".join(lines), fix="use the base that the adapters were trained on.")
    _fill(wanted, layers, tensors, ends)
    return model, wanted


def _find_targets(tensors: dict[str, np.ndarray], every: ModelConfig, shapes: Any) -> tuple[str, ...]:
    """Return the linear layers of a model with all adapters that have one among tensors.

    The table that PEFT saves beside the adapter of a head is left out of these: it is frozen, and the base's.
    """
    found: dict[str, None] = {}
    for own in adapted_layers(every, joined="leave out"):
        copy = own.tensor_name((), ".base_layer.weight") if own.kernel.is_head else ""
        if copy in tensors and tensors[copy].shape == shapes[HEAD]["table"].shape:
            del tensors[copy]
        if own.tensor_name((0,) * own.tensor.num_stacked, ENDS["lora_a"]) in tensors:
            found[own.kernel.linear.name] = None
    return tuple(found)


def _fill(wanted: Any, layers: tuple[AdaptedLayer, ...], tensors: Mapping[str, np.ndarray], ends: Any) -> None:
    """Put the tensors of adapters in the places of their shapes."""
    for own in layers:
        node = node_at(wanted, own.kernel.path)
        for param, end in ends.items():
            names = [own.tensor_name(number, end) for number in own.numbers(node[param].shape)]
            whole = np.stack([own.turn(tensors[name], param) for name in names])
            node[param] = _place(whole.reshape(node[param].shape).astype(np.float32), node[param])


def _place(whole: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])


def _load(folder: Path) -> dict[str, np.ndarray]:
    path = find_file(folder, WEIGHTS_FILE)
    if path is None:
        raise WeightsError(f"{folder} has no {WEIGHTS_FILE}.", fix="save the adapters with safe_serialization=True.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}", fix="copy the file again.") from None
