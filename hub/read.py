"""Read Hugging Face weights onto a mesh: every device reads its own slices, so the host never holds the whole model.

Before any weight is read, the headers are compared with the wanted shapes, and all mistakes are listed. Read
`write.py` next.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..meshes import WeightsError
from ..meshes.errors import printable
from .architectures import ARCHITECTURES
from .architectures.tensor_names import TensorNames, TensorPlace
from .config import HubModel, read_hub_model
from .mxfp4 import widen_tensors
from .saves.paths import leaves_by_path, path_text
from .tensor_files import FLOATS, TensorFiles, open_tensor_files

_SHOWN = 20


def _ignore(_message: str) -> None:
    pass


def _keep(_path: str, leaf: jax.Array) -> Any:
    return leaf


def read_weights(
    folder: str | Path,
    shapes: Any,
    *,
    say: Callable[[str], object] = _ignore,
    each: Callable[[str, jax.Array], Any] = _keep,
) -> Any:
    """Return the parameters of a Hugging Face folder as arrays of the given shapes, types and shardings.

    Every device reads its slices of the files and converts them to the wanted type. The host holds one device's part
    of one parameter at a time.

    Args:
        shapes: a tree {"embed", "blocks", "head"} of `jax.ShapeDtypeStruct` with shardings, shaped like the parameters
            of a `Transformer`; blocks are [L, ...].
        say: called with a line for every two keys or files that differ, with the one that was used.
        each: called with the path of each parameter, "blocks.mlp.up.kernel", and its array, before the next one is
            read; what it returns takes the array's place.

    Raises:
        WeightsError: the files are broken, or tensors are missing, unknown or of another shape; no weight is read then.
    """
    weights = open_weights(folder, shapes)
    for warning in weights.warnings:
        # Names in the files are quoted, and may hold terminal escapes.
        say(printable(f"warning   {folder}: {warning}", limit=1_000))

    def read(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        return each(path_text(path), _read_leaf(weights, path_text(path), leaf))

    return jax.tree_util.tree_map_with_path(read, shapes)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The tensors of a folder, checked to hold all parameters of a model.

    Args:
        files: the tensors.
        names: their names in the architecture.
        places: place of each parameter, by path.
        prefix: prefix of the names in these files.
        warnings: a line for every two keys or files that differ.
    """

    files: TensorFiles
    names: TensorNames
    places: dict[str, TensorPlace]
    prefix: str
    warnings: tuple[str, ...]

    def full_name(self, path: str, number: tuple[int, ...] = ()) -> str:
        """Return the name of a tensor of a parameter, by its index along the dimensions over which it is stacked."""
        return self.names.full_name(self.places[path].tensor_name(number), prefix=self.prefix)


def open_weights(folder: str | Path, shapes: Any) -> WeightFiles:
    """Open the files of a folder, and check their headers against the parameters; reads no weight.

    Args:
        shapes: as in `read_weights`.

    Raises:
        WeightsError: the files do not hold the parameters; up to 20 mistakes are listed.
    """
    model = read_hub_model(folder)
    names = ARCHITECTURES[model.architecture].tensors
    files = _open_files(folder, model)
    has_prefix = any(name.startswith(names.prefix) for name in (*files.shapes, *files.lost))
    leaves = leaves_by_path(shapes)
    found = WeightFiles(
        files=files,
        names=names,
        places=names.select(leaves),
        prefix=names.prefix if has_prefix else "",
        warnings=(*model.warnings, *files.warnings),
    )
    stacked = replace(found, places=names.with_stacked().select(leaves))
    if _has_only(stacked, found, leaves):
        found, stacked = stacked, found
    table = found.places["embed.table"]
    if "head.table" not in leaves and found.prefix + table.name not in files.shapes and names.head in files.shapes:
        # Tied embeddings whose single table is stored under the name of the head.
        found = replace(found, places=found.places | {"embed.table": replace(table, name=names.head)})
    num_layers = model.config.num_layers
    mistakes = [*files.mistakes, *_find_mistakes(found, leaves, other=stacked, num_layers=num_layers)]
    if model.config.embeddings == "untied" and "head.table" not in leaves:
        mistakes.append(f"{names.head} is a table of its own, and the model that was asked for has none")
    if left_out := [name for name in files.shapes if names.is_of_more_layers(name, num_layers=num_layers)]:
        warning = f"{len(left_out)} tensors of layers behind the last, {left_out[0]} among them, are left out"
        found = replace(found, warnings=(*found.warnings, warning))
    if mistakes:
        more = [f"and {len(mistakes) - _SHOWN} more"] if len(mistakes) > _SHOWN else []
        lines = [f"{folder} does not hold what its config.json says:", *mistakes[:_SHOWN], *more]
        raise WeightsError("\n  ".join(lines), fix="copy the folder again, whole.")
    return found


def _open_files(folder: str | Path, model: HubModel) -> TensorFiles:
    files = open_tensor_files(folder)
    return widen_tensors(files) if model.values.get("quantization_config") else files


def _has_only(weights: WeightFiles, other: WeightFiles, leaves: Mapping[str, Any]) -> bool:
    """Return whether the files have tensors of one form of experts, and none of the other."""
    here, there = (_list_wanted(form, leaves).keys() for form in (weights, other))
    named = weights.files.shapes.keys() | weights.files.lost
    return bool(named & (here - there)) and not named & (there - here)


def _find_mistakes(
    weights: WeightFiles, leaves: Mapping[str, Any], *, other: WeightFiles, num_layers: int
) -> Iterator[str]:
    """Yield a line for each tensor that is missing, unknown, of another shape or dtype, or there in two forms."""
    files, names = weights.files, weights.names
    wanted, other_form = _list_wanted(weights, leaves), _list_wanted(other, leaves)
    # Tensors of a file that cannot be read are not listed again: `files.mistakes` has the file.
    for name in sorted(wanted.keys() - files.shapes.keys() - files.lost):
        yield f"{name} {list(wanted[name])} is missing"
    for name in sorted(wanted.keys() & files.shapes.keys()):
        yield from _compare_tensor(files, name, wanted[name])
    for name in sorted(files.shapes.keys() - wanted.keys() - {names.head}):
        if name in other_form:
            yield f"{name} holds experts a second time: files have them one by one or stacked, not both"
        elif not (names.ignored and name.endswith(names.ignored)) and not names.is_of_more_layers(
            name, num_layers=num_layers
        ):
            yield f"{name} {list(files.shapes[name])} is not known"
    if names.head in files.shapes and names.head not in wanted:
        # A tied model may store its table a second time, of the same shape.
        yield from _compare_tensor(files, names.head, wanted[weights.full_name("embed.table")])


def _compare_tensor(files: TensorFiles, name: str, shape: tuple[int, ...]) -> Iterator[str]:
    if files.shapes[name] != shape:
        yield f"{name} is {list(files.shapes[name])}, not {list(shape)}"
    if files.dtypes[name] not in FLOATS:
        yield f"{name} is of type {files.dtypes[name]}, not {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"


def _list_wanted(weights: WeightFiles, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the parameters need, by its full name."""
    wanted = {}
    for path, leaf in leaves.items():
        place = weights.places[path]
        shape = place.shape(tuple(leaf.shape))
        for number in np.ndindex(leaf.shape[: place.num_stacked]):
            wanted[weights.full_name(path, number)] = shape
    return wanted


def _read_leaf(weights: WeightFiles, path: str, leaf: Any) -> jax.Array:
    groups: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        # Devices with the same bounds hold copies of one block, which is read once.
        own = tuple(one.indices(size)[:2] for one, size in zip(index, leaf.shape, strict=True))
        groups.setdefault(own, []).append(device)
    arrays = []
    # By hand, since jax.make_array_from_callback holds the parts of all devices on the host before it sends the first.
    for bounds, devices in groups.items():
        block = _read_block(weights, path, [slice(*own) for own in bounds], leaf.dtype)
        arrays += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _read_block(weights: WeightFiles, path: str, index: list[slice], dtype: Any) -> np.ndarray:
    """Return a block of a parameter in the wanted type, read tensor by tensor where it is stacked."""
    place = weights.places[path]
    own = tuple(index[place.num_stacked :])
    block = np.empty([one.stop - one.start for one in index], dtype)
    for target in np.ndindex(block.shape[: place.num_stacked]):
        name = weights.full_name(path, tuple(one.start + i for one, i in zip(index, target, strict=False)))
        piece = weights.files.read(name, place.index(own, weights.files.shapes[name]))
        block[target] = piece.swapaxes(-1, -2) if place.layout == "transposed" else piece
    return block
