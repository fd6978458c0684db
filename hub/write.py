"""Write parameters as a Hugging Face model folder; the host holds the tensors of one file at a time.

The folder gets its name once it is complete. Read `../commands/export_hf.py` next.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ..layers import ModelConfig
from ..meshes import WeightsError
from ..meshes.arguments import check_count
from ..meshes.files.new_folder import new_folder
from .architectures import ARCHITECTURES
from .config_write import hub_values
from .folder import copy_file
from .saves.paths import leaves_by_path
from .tensor_files import INDEX, SINGLE

_MAX_FILE_BYTES = 5_000_000_000
_TORCH = {"format": "pt"}


def write_weights(
    params: Any,
    config: ModelConfig,
    folder: str | Path,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    extra_values: Mapping[str, Any] | None = None,
    extra_files: Sequence[Path] = (),
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> dict[str, Any]:
    """Write config.json and safetensors files that `transformers` loads, and return the keys of config.json.

    Args:
        params: a tree {"embed", "blocks", "head"} of arrays on any mesh, as `read_weights` returns it.
        folder: folder to create; it may exist if it is empty.
        architecture: `model_type` to write; required if several architectures support the model.
        dtype: dtype of the tensors; that of the parameters if left out.
        extra_values: more keys of config.json, such as ids of special tokens.
        extra_files: files to copy into the folder, such as those of a tokenizer.
        max_file_bytes: largest size of a file; larger models are split into several files with an index.

    Raises:
        WeightsError: the folder exists, cannot be written, or no architecture supports the model, or parameters are on
            devices of other processes.
    """
    check_count("max_file_bytes", max_file_bytes, error=WeightsError)
    _check_addressable(params)
    values = dict(extra_values or {}) | hub_values(config, architecture=architecture)
    kind = np.dtype(dtype or jax.tree.leaves(params)[0].dtype)
    values["dtype"] = kind.name
    leaves = leaves_by_path(params)
    tensors = _list_tensors(leaves, values["model_type"], kind)
    with new_folder(folder) as part:
        _write_files(part, tensors, leaves, max_file_bytes)
        _write_json(part / "config.json", values)
        for file in extra_files:
            copy_file(file.parent, file.name, part / file.name)
    return values


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor to write: its name and size, and the paths of the parameters that it concatenates.

    number: its index along the dimensions over which they are stacked, (), (layer,) or (layer, expert); `layer` is that
    of the model.
    """

    name: str
    num_bytes: int
    paths: tuple[str, ...]
    number: tuple[int, ...]
    is_transposed: bool
    is_interleaved: bool
    layer: int
    dtype: np.dtype


def _check_addressable(params: Any) -> None:
    for path, leaf in leaves_by_path(params).items():
        if not leaf.is_fully_addressable:
            raise WeightsError(
                f"{path} is in part on devices of other processes, and this process writes all of it.",
                fix="write from one process: trellax export-hf reads the run's folder.",
            )


def _list_tensors(leaves: Mapping[str, jax.Array], model_type: str, dtype: np.dtype) -> list[_Tensor]:
    names = ARCHITECTURES[model_type].tensors
    places = names.select(leaves)
    # GPT-2 stores query, key and value as one tensor: parameters of one name are joined in the order of their parts.
    joined: dict[tuple[str, int], list[str]] = {}
    for path in sorted(places, key=lambda path: places[path].part):
        joined.setdefault((places[path].name, places[path].first), []).append(path)
    tensors = []
    for paths in joined.values():
        place, leaf = places[paths[0]], leaves[paths[0]]
        kind = np.dtype("float32") if place.dtype == "float32" else dtype
        num_bytes = math.prod(place.shape(leaf.shape)) * kind.itemsize
        tensors += [
            _Tensor(
                name=names.full_name(place.tensor_name(number), prefix=names.prefix),
                num_bytes=num_bytes,
                paths=tuple(paths),
                number=number,
                is_transposed=place.layout == "transposed",
                is_interleaved=place.order == "interleaved",
                layer=place.first + number[0] if number else 0,
                dtype=kind,
            )
            for number in np.ndindex(leaf.shape[: place.num_stacked])
        ]
    return sorted(tensors, key=lambda tensor: (tensor.layer, tensor.name))


def _write_files(part: Path, tensors: list[_Tensor], leaves: Mapping[str, jax.Array], max_file_bytes: int) -> None:
    groups = list(_fill_files(tensors, max_file_bytes))
    index = {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({tensor.name: _fetch(tensor, leaves) for tensor in group}, part / name, metadata=_TORCH)
        index |= {tensor.name: name for tensor in group}
    if len(groups) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fill_files(tensors: list[_Tensor], max_file_bytes: int) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    for tensor in tensors:
        if group and sum(one.num_bytes for one in group) + tensor.num_bytes > max_file_bytes:
            yield group
            group = []
        group.append(tensor)
    yield group


def _fetch(tensor: _Tensor, leaves: Mapping[str, jax.Array]) -> np.ndarray:
    """Return a tensor as a host array."""
    parts = [_fetch_part(leaves[path], tensor.number) for path in tensor.paths]
    if tensor.is_interleaved:
        whole = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
    else:
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    # safetensors saves the memory of a non-contiguous view as it is, in the wrong order.
    return np.ascontiguousarray((whole.T if tensor.is_transposed else whole).astype(tensor.dtype))


def _fetch_part(leaf: jax.Array, number: tuple[int, ...]) -> np.ndarray:
    """Return one element along the stacked dimensions; only the devices that hold it send their parts of it.

    Indexing the whole array would gather it, on every device, where those dimensions are split.
    """
    part = np.empty(leaf.shape[len(number) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        outer, own = shard.index[: len(number)], shard.index[len(number) :]
        starts = [one.indices(size)[0] for one, size in zip(outer, leaf.shape, strict=False)]
        local = tuple(i - start for i, start in zip(number, starts, strict=True))
        is_here = all(0 <= i < size for i, size in zip(local, shard.data.shape, strict=False))
        # Copies on other devices are the same.
        if is_here and shard.replica_id == 0:
            part[own] = np.asarray(shard.data[local])
    return part
