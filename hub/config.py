"""Read the config.json of a Hugging Face model as a `ModelConfig`, or list all settings that trellax cannot compute.

Keys that do not change the logits of a trained model (dropout, initialization, caches) are ignored. If two keys differ,
the one that transformers 5 reads is used, with a warning. Read `architectures/architecture.py` next, and
`config_write.py` for the other direction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..layers import ModelConfig
from ..layers.lora.check_config import LORA_FIELDS
from ..meshes import ModelError, WeightsError
from ..meshes.errors import shown
from .architectures import ARCHITECTURES
from .architectures.architecture import Architecture, take_first
from .architectures.missing import MISSING
from .architectures.numbers import find_wrong_numbers
from .folder import read_json
from .ties import has_own_head


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """The model that a config.json describes.

    Args:
        config: the model.
        architecture: its `model_type`, a key of `ARCHITECTURES`.
        values: the keys of config.json, unchanged.
        warnings: a line for every two keys or files that differ, with the one that was used.
    """

    config: ModelConfig
    architecture: str
    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def read_hub_model(folder: str | Path) -> HubModel:
    """Read the config.json of a folder; embeddings are tied only if the weights do not hold two different tables.

    Raises:
        WeightsError: there is no config.json, it is broken, or it has unsupported settings, which are all listed.
    """
    file = Path(folder) / "config.json"
    values = read_json(folder, file.name)
    if values is None and not file.is_file():
        raise WeightsError(
            f"{folder} has no config.json." if Path(folder).is_dir() else f"{folder} is no folder.",
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
    """Convert the keys of a config.json.

    >>> hub_model({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12}).config.bias
    'on'

    Raises:
        WeightsError: settings are not supported; all are listed.
    """
    name = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # No nearest name is suggested: "llama4" is not a misspelt "llama", and loading it as one would be wrong.
        why = f": missing are {MISSING[name]}" if isinstance(name, str) and name in MISSING else ""
        raise WeightsError(
            f"model_type={shown(name)} is no architecture that trellax has{why}.",
            fix=f"use a model of {', '.join(ARCHITECTURES)}.",
        )
    warnings: list[str] = []
    try:
        resolved = _resolve_keys(values, ARCHITECTURES[name], warnings)
        config = _read_model(resolved, ARCHITECTURES[name])
    except ModelError as error:
        raise WeightsError(error.problem, fix="correct config.json.") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        # A list in place of a number, for example, which transformers never writes.
        raise WeightsError(f"a setting is of another type than it should be: {error}.", fix="copy it again.") from None
    return HubModel(config=config, architecture=name, values=values, warnings=tuple(warnings))


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the fields that differ between two models and change the meaning of weights; `dtype` does not.

    Nor do losses of routers, how fast their biases move, the room of experts, adapters, which are added to weights, and
    the width of dense layers where every layer has experts.
    """
    ignored = {"dtype", "balance_loss", "router_z_loss", "router_bias_rate", "expert_capacity", "expert_overflow"}
    ignored |= {"dropout", "stochastic_depth", *LORA_FIELDS}
    ignored |= {"max_tokens"} if one.positions == other.positions == "rotary" else set()
    has_dense = any(model.dense_layers or not model.num_experts for model in (one, other))
    ignored |= set() if has_dense else {"ffn_size"}
    names = [field.name for field in fields(ModelConfig) if field.name not in ignored]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _resolve_keys(values: Mapping[str, Any], architecture: Architecture, warnings: list[str]) -> dict[str, Any]:
    """Return the keys with one value for each setting; append a line to `warnings` for every two that differ."""
    classes = values.get("architectures") or [architecture.class_name]
    if architecture.class_name not in classes:
        warnings.append(f"architectures={shown(classes)}, but model_type={architecture.model_type!r} counts")
    dtype = take_first(values, ("dtype", "torch_dtype"), warnings)
    return {**values, "dtype": dtype} | architecture.resolve_keys(values, warnings)


def _read_model(values: Mapping[str, Any], architecture: Architecture) -> ModelConfig:
    found = [*architecture.find_unsupported_keys(values), *_find_unsupported_keys(values, architecture)]
    # Layers are checked one by one, so only if their number is valid.
    found += list(find_wrong_numbers(values, architecture)) or architecture.find_unsupported_layers(values)
    if found:
        are = "is" if len(found) == 1 else "are"
        raise WeightsError("\n  ".join([f"{len(found)} of its settings {are} not supported:", *found]))
    return ModelConfig(**architecture.read(values))


def _find_unsupported_keys(values: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    """Yield one line for each setting that no architecture can compute, and for weights in a form that is not read."""
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        if method not in architecture.tensors.quantized:
            yield "quantization_config: the weights are quantised; use those that are not"
    if values.get("text_config"):
        yield "text_config: a model within a model; use that of the text alone"
    if not isinstance(tied := values.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings={shown(tied)} is neither true nor false"
