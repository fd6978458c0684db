"""Open the safetensors files of a folder as one table of tensors, and read slices of them.

Opening reads only headers. If two files hold a tensor, the one that transformers reads is used, with a warning.
Read `read.py` next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..meshes import WeightsError
from .folder import find_file, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

FLOATS = ("F32", "BF16", "F16")
"""The dtypes that parameters may have, as safetensors names them."""

_MAX_HEADER_BYTES = 100_000_000
"""Maximum total size of the headers; the format allows this for each file, and real models need a few MB."""

_MOST_TENSORS = 250_000
"""Maximum number of tensors in all files; the largest dense models have about 1,000, and one tensor for each of
128 experts in 94 layers makes 37,000."""

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """The tensors of a folder, by name.

    Args:
        shapes: shape of each tensor.
        dtypes: dtype of each tensor, as safetensors names it.
        slices: function that reads a slice of each tensor.
        mistakes: a line for each file that cannot be read.
        lost: names of the tensors that those files should hold.
        warnings: a line for every tensor in two files, with the file that was used.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    slices: Mapping[str, Callable[[tuple[slice, ...]], np.ndarray]]
    mistakes: tuple[str, ...]
    lost: frozenset[str]
    warnings: tuple[str, ...] = ()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read a slice of a tensor, and nothing else of its file."""
        return self.slices[name](index)


def open_tensor_files(folder: str | Path) -> TensorFiles:
    """Open model.safetensors, or if there is none all files that model.safetensors.index.json lists.

    Raises:
        WeightsError: the folder has neither, or a file of the two is broken.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if find_file(folder, SINGLE) is None:
        if not index:
            raise _nothing_to_read(folder)
        return _open_shards(folder, index)
    found = _Opened()
    if problem := found.open(folder, SINGLE):
        raise WeightsError(f"{folder}: {problem}.", fix="copy the file again.")
    shards = sorted(set(index.values()) - {SINGLE})
    warnings = [f"{SINGLE} is read, as transformers does, not the {len(shards)} files of {INDEX}"] if shards else []
    return found.as_files(warnings=warnings)


@dataclass(kw_only=True)
class _Opened:
    """The tensors of the files opened so far. Of two with one name the later is kept, or that of the `owner` file."""

    owner: Mapping[str, str] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    slices: dict[str, Any] = field(default_factory=dict)
    header_bytes: int = 0

    def open(self, folder: Path, file: str) -> str:
        """Add the tensors of a file, and return the problem with it, or ""."""
        path = find_file(folder, file)
        if path is None:
            return f"{file} is missing"
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        # A larger header is not counted here: safetensors refuses it by itself.
        self.header_bytes += header_bytes if header_bytes <= _MAX_HEADER_BYTES else 0
        if self.header_bytes > _MAX_HEADER_BYTES:
            return f"{file} has a header that brings all headers to more than {_MAX_HEADER_BYTES // 10**6} MB"
        try:
            opened: Any = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            return f"{file} is no whole safetensors file: {error}"
        names = opened.keys()
        if len(names) + len(self.shapes) > _MOST_TENSORS:
            return f"{file} brings the tensors of all files to more than {_MOST_TENSORS:,}"
        for name in names:
            self.places.setdefault(name, []).append(file)
            # Kept from the file that the index names, if that was opened before; otherwise the later file replaces it.
            is_taken = name in self.shapes and self.owner.get(name) in self.places[name][:-1]
            if not is_taken:
                tensor = opened.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
                self.slices[name] = partial(_read_slice, tensor)
        return ""

    def as_files(self, *, mistakes: tuple[str, ...] = (), lost: Any = (), warnings: Any = ()) -> TensorFiles:
        """Return the tensors that were opened."""
        return TensorFiles(
            shapes=self.shapes,
            dtypes=self.dtypes,
            slices=self.slices,
            mistakes=mistakes,
            lost=frozenset(lost),
            warnings=tuple(warnings),
        )


def _read_slice(tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Read a slice of a tensor; safetensors reads no steps, so these are taken of what lies between."""
    piece = tensor[tuple(slice(one.start, one.stop) for one in index)]
    return piece[tuple(slice(None, None, one.step) for one in index)]


def _open_shards(folder: Path, index: Mapping[str, str]) -> TensorFiles:
    found = _Opened(owner=index)
    mistakes, lost = [], []
    homes: dict[str, list[str]] = {}
    for name, file in index.items():
        homes.setdefault(file, []).append(name)
    # The order in which transformers reads them.
    for file, names in sorted(homes.items()):
        if problem := found.open(folder, file):
            mistakes.append(f"{problem}; {len(names)} tensors are lost")
            lost += names
    return found.as_files(mistakes=tuple(mistakes), lost=lost, warnings=_describe_copies(found, index))


def _describe_copies(found: _Opened, index: Mapping[str, str]) -> list[str]:
    """Return a line for each tensor that is in several files, with the file that is read."""
    several = {name: files for name, files in found.places.items() if len(files) > 1}
    lines = []
    for name, files in sorted(several.items())[:_SHOWN]:
        taken = index.get(name) if index.get(name) in files else files[-1]
        why = f"as {INDEX} says" if taken == index.get(name) else "the last of them, as transformers does"
        differs = "" if taken == files[-1] else f"; transformers takes that of {files[-1]}"
        lines.append(f"{name} is in {' and in '.join(files)}: that of {taken} is read, {why}{differs}")
    return lines + ([f"{len(several) - _SHOWN} more tensors are in several files"] if len(several) > _SHOWN else [])


def _nothing_to_read(folder: Path) -> WeightsError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return WeightsError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can run any code when they are read.",
            fix="load it with transformers and save it again with save_pretrained, which writes safetensors.",
        )
    return WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}.", fix="name the folder that holds the weights.")


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index names it; empty if there is no index."""
    values = read_json(folder, INDEX)
    if values is None:
        return {}
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise WeightsError(
            f"{folder / INDEX} is no index of weights: it has no weight_map from tensors to files.",
            fix="copy it again.",
        )
    for name, file in files.items():
        # A name with a slash in it would be read from another folder.
        if file in ("", ".", "..") or "\0" in file or Path(file).name != file:
            raise WeightsError(
                f"{folder / INDEX} has {name} in {file!r}, which is no name of a file in this folder.",
                fix="copy the folder again, whole.",
            )
    return files
