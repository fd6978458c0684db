"""Folders in which two keys or files differ, each beside a folder with only the value that transformers 5.24 takes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from trellax.hub.tensor_files import INDEX, SINGLE

from .hub import GOLDEN

Tensors = dict[str, np.ndarray]
HEAD = "lm_head.weight"
LINEAR = {"rope_type": "linear", "factor": 4.0}


@dataclass(frozen=True, kw_only=True)
class Double:
    """A model of the goldens and two changes to its folder: one adds a second value, one leaves the value that counts.

    `is_ours` marks cases that transformers reads otherwise, or fails on.
    """

    model: str
    twice: Callable[[Path], Any]
    once: Callable[[Path], Any]
    is_ours: bool = False


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder."""
    return {name: leaf for file in sorted(folder.glob("*.safetensors")) for name, leaf in load_file(file).items()}


def merge(folder: Path, change: Callable[[Tensors], Any] = dict) -> None:
    """Write the folder as one file, its tensors changed."""
    tensors = tensors_of(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save(tensors, folder / SINGLE)


def save(tensors: Tensors, file: Path) -> None:
    """Write a file as transformers wants it."""
    save_file(tensors, file, metadata={"format": "pt"})


def say(**values: Any) -> Callable[[Path], None]:
    """Change keys of config.json; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        changed = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return change


def in_turn(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Make several changes."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def _drawn(like: np.ndarray) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.3, like.shape).astype(like.dtype)


def _with_head(table: str, *, values: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[HEAD] = _drawn(tensors[table]) if values == "others" else tensors[table].copy()
        if values == "moved":
            del tensors[table]

    return lambda folder: merge(folder, change)


def _stale_index(folder: Path) -> None:
    """The shards stay, and beside them is a file with other values."""
    save({name: _drawn(leaf) for name, leaf in tensors_of(folder).items()}, folder / SINGLE)


def _fresh_file(folder: Path) -> None:
    merge(folder, lambda tensors: tensors.update({name: _drawn(leaf) for name, leaf in tensors.items()}))


def copy_into_other_shard(name: str) -> Callable[[Path], None]:
    """A stale copy of a tensor, in a file that the index does not name for it."""

    def change(folder: Path) -> None:
        homes = json.loads((folder / INDEX).read_text())["weight_map"]
        other = next(file for file in sorted(set(homes.values())) if file != homes[name])
        tensors = load_file(folder / other)
        tensors[name] = _drawn(load_file(folder / homes[name])[name])
        save(tensors, folder / other)

    return change


def _nothing(_: Path) -> None:
    pass


_LLAMA, _GPT2 = "model.embed_tokens.weight", "transformer.wte.weight"
_UNTIED = say(tie_word_embeddings=False)

DOUBLES: dict[str, Double] = {
    f"{model}, {values} head": Double(
        model=model,
        twice=_with_head(table, values=values),
        once=in_turn(_with_head(table, values=values), _UNTIED) if values == "others" else _nothing,
    )
    for model, table in (("llama32", _LLAMA), ("qwen3", _LLAMA), ("gpt2", _GPT2))
    for values in ("others", "same", "moved")
}
DOUBLES |= {
    "a stale index": Double(model="llama3", twice=_stale_index, once=_fresh_file),
    "a copy in an earlier file": Double(model="llama3", twice=copy_into_other_shard(HEAD), once=_nothing),
    "a copy in a later file": Double(model="llama3", twice=copy_into_other_shard(_LLAMA), once=_nothing, is_ours=True),
    "rope_scaling beside rope_parameters": Double(
        model="llama3",
        twice=say(rope_scaling=LINEAR),
        once=say(rope_parameters=LINEAR | {"rope_theta": 10_000.0}),
    ),
    "rope_scaling of its own base": Double(
        model="llama2",
        twice=say(rope_scaling=LINEAR | {"rope_theta": 77.0}, rope_theta=5.0),
        once=say(rope_parameters=LINEAR | {"rope_theta": 77.0}),
    ),
    "a base beside": Double(model="llama3", twice=say(rope_theta=77.0), once=_nothing),
    "a base beside alone": Double(
        model="llama3",
        twice=say(rope_parameters={"rope_type": "default"}, rope_theta=77.0),
        once=say(rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
    ),
    "type and rope_type": Double(
        model="llama2",
        twice=say(rope_parameters=LINEAR | {"type": "dynamic", "rope_theta": 1e4}),
        once=say(rope_parameters=LINEAR | {"rope_theta": 1e4}),
    ),
    "original tokens beside": Double(
        model="llama3",
        twice=say(original_max_position_embeddings=16),
        once=lambda folder: say(
            rope_parameters=json.loads((folder / "config.json").read_text())["rope_parameters"]
            | {"original_max_position_embeddings": 16}
        )(folder),
    ),
    "heads by two names": Double(model="gpt2", twice=say(num_attention_heads=2), once=say(n_head=2)),
    "windows that are off": Double(
        model="qwen3",
        twice=say(sliding_window=4, layer_types=["sliding_attention"] * 2),
        once=_nothing,
        is_ours=True,
    ),
    "layer types without windows": Double(
        model="qwen2",
        twice=say(sliding_window=4, use_sliding_window=True, max_window_layers=0),
        once=_nothing,
    ),
    "experts of a mixtral by two names": Double(
        model="mixtral", twice=say(num_local_experts=2, num_experts=4), once=_nothing
    ),
    "experts of a qwen3_moe by two names": Double(
        model="qwen3_moe", twice=say(num_local_experts=8, num_experts=2), once=_nothing
    ),
    "biases of a mistral": Double(model="mistral", twice=say(attention_bias=True), once=_nothing),
    "another class": Double(model="llama3", twice=say(architectures=["MistralForCausalLM"]), once=_nothing),
    "two types": Double(model="llama3", twice=say(torch_dtype="bfloat16"), once=_nothing),
}


def make(double: Double, folder: Path, *, how: Callable[[Path], Any]) -> Path:
    """Return a copy of a golden, changed."""
    shutil.copytree(GOLDEN / double.model, folder)
    how(folder)
    return folder
