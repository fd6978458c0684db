"""The safetensors files of a folder as one table of tensors, of which any slice is read without the rest.

Opening reads headers alone. Read `hf_read.py` next.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..meshes import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """Every tensor of a folder: its shape, its type as safetensors names it, and how to read a slice of it.

    `mistakes` is what is wrong with the files themselves, a line each; `lost` are the tensors that those should hold.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    slices: Mapping[str, Callable[[tuple[slice, ...]], np.ndarray]]
    mistakes: tuple[str, ...]
    lost: frozenset[str]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a tensor; no other byte of the file is read."""
        return self.slices[name](index)


def open_tensor_files(folder: str | Path) -> TensorFiles:
    """Return the tensors of model.safetensors, or of all files that model.safetensors.index.json names.

    Raises:
        WeightsError: the folder has neither, or the index is broken.
    """
    folder = Path(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    slices: dict[str, Any] = {}
    mistakes: list[str] = []
    lost: list[str] = []
    for file, wanted in _find_files(folder).items():
        try:
            opened: Any = safe_open(folder / file, framework="np")
        except (SafetensorError, OSError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            problem = f"{file} is missing" if is_missing else f"{file} is no whole safetensors file: {error}"
            if not wanted:
                raise WeightsError(f"{folder}: {problem}.", fix="copy the file again.") from None
            mistakes.append(f"{problem}; {len(wanted)} tensors are lost")
            lost += wanted
            continue
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            tensor = opened.get_slice(name)
            shapes[name], dtypes[name], slices[name] = tuple(tensor.get_shape()), tensor.get_dtype(), tensor.__getitem__
    return TensorFiles(shapes=shapes, dtypes=dtypes, slices=slices, mistakes=tuple(mistakes), lost=frozenset(lost))


def _find_files(folder: Path) -> dict[str, list[str]]:
    """Files by name, with the tensors that the index says are in each."""
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    if (folder / SINGLE).is_file():
        return {SINGLE: []}
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise WeightsError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can run any code when they are read.",
            fix="load it with transformers and save it again with save_pretrained, which writes safetensors.",
        )
    raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}.", fix="name the folder that holds the weights.")


def _read_index(file: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    try:
        for name, part in json.loads(file.read_text(encoding="utf-8"))["weight_map"].items():
            # A name with a folder in it would read from elsewhere.
            files.setdefault(Path(part).name, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise WeightsError(f"{file} is no index of weights: {error}.", fix="copy it again.") from None
    return files
