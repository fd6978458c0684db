"""Read the config.json of a Hugging Face model as a `ModelConfig`; list at once what trellax cannot compute.

Keys that change no logits of a trained model (dropout, initial values, caches) are ignored. Where two keys differ, the
one counts that transformers 5 takes, and a warning says so. Read `architectures/` for what differs between
architectures, and `config_write.py` for the way back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..layers import ModelConfig
from ..meshes import ModelError, WeightsError
from ..meshes.errors import shown
from .architectures import ARCHITECTURES
from .architectures.architecture import Architecture, take_first
from .architectures.numbers import find_wrong_numbers
from .folder import read_json
from .ties import has_own_head


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """The model that a config.json describes.

    Args:
        config: the model.
        architecture: its `model_type`, a key of `ARCHITECTURES`.
        values: the keys of config.json as they stand.
        warnings: one line for every two keys or files that differ, and which was taken.
    """

    config: ModelConfig
    architecture: str
    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def read_hub_model(folder: str | Path) -> HubModel:
    """Return the model that the config.json of a folder describes; its embeddings are tied only if its weights agree.

    Raises:
        WeightsError: there is no config.json, it is broken, or it asks for what trellax does not have, all listed.
    """
    file = Path(folder) / "config.json"
    values = read_json(folder, file.name)
    if values is None and not file.is_file():
        raise WeightsError(
            f"{folder} has no config.json.",
            fix="name a Hugging Face model's folder, as save_pretrained writes it.",
        )
    try:
        model = hub_model(values)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error.problem}", fix=error.fix) from None
    if model.config.embeddings == "tied" and has_own_head(folder, ARCHITECTURES[model.architecture].tensors):
        warning = (
            "tie_word_embeddings is true, but the files hold an lm_head.weight of its own: it is taken, as "
            "transformers does, and the model is untied"
        )
        return replace(model, config=replace(model.config, embeddings="untied"), warnings=(*model.warnings, warning))
    return model


def hub_model(values: Mapping[str, Any]) -> HubModel:
    """Return the model that the keys of a config.json describe.

    >>> hub_model({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12}).config.bias
    'on'

    Raises:
        WeightsError: they ask for what trellax does not have, all of it listed.
    """
    name = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # No nearest name: "llama4" is no misspelt "llama", and loading it as one would be a wrong model.
        raise WeightsError(
            f"model_type={shown(name)} is no architecture that trellax has.",
            fix=f"use a model of {', '.join(ARCHITECTURES)}.",
        )
    warnings: list[str] = []
    try:
        settled = _settle(values, ARCHITECTURES[name], warnings)
        config = _read_model(settled, ARCHITECTURES[name])
    except ModelError as error:
        raise WeightsError(error.problem, fix="correct config.json.") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        # Lists where numbers belong, and the like: nothing that transformers writes.
        raise WeightsError(f"a setting is of another type than it should be: {error}.", fix="copy it again.") from None
    return HubModel(config=config, architecture=name, values=values, warnings=tuple(warnings))


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the fields in which two models differ and that matter to weights: not the compute type, for one."""
    ignored = {"dtype"} | ({"max_tokens"} if one.positions == other.positions == "rotary" else set())
    names = [field.name for field in fields(ModelConfig) if field.name not in ignored]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _settle(values: Mapping[str, Any], architecture: Architecture, warnings: list[str]) -> dict[str, Any]:
    """Return the keys with one value for each thing; add a line to `warnings` for every two that differ."""
    classes = values.get("architectures") or [architecture.class_name]
    if architecture.class_name not in classes:
        warnings.append(f"architectures={shown(classes)}, but model_type={architecture.model_type!r} counts")
    dtype = take_first(values, ("dtype", "torch_dtype"), warnings)
    return {**values, "dtype": dtype} | architecture.settle(values, warnings)


def _read_model(values: Mapping[str, Any], architecture: Architecture) -> ModelConfig:
    found = [*architecture.refusals(values), *_find_refusals(values)]
    # Layers are checked one by one, so their number must be one.
    found += list(find_wrong_numbers(values, architecture)) or architecture.layer_refusals(values)
    if found:
        are = "is" if len(found) == 1 else "are"
        raise WeightsError("\n  ".join([f"{len(found)} of its settings {are} not supported:", *found]))
    return ModelConfig(**architecture.read(values))


def _find_refusals(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each setting that no architecture can compute."""
    if values.get("quantization_config"):
        yield "quantization_config: the weights are quantised; use those that are not"
    if values.get("text_config"):
        yield "text_config: a model within a model; use that of the text alone"
    if not isinstance(tied := values.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings={shown(tied)} is neither true nor false"
