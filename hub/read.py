"""Hugging Face weights straight onto a mesh: every device reads its own slices; the host never holds the model.

Headers are checked against the wanted shapes first, and all that is wrong is said at once. Read `write.py` next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..meshes import WeightsError
from ..meshes.errors import printable
from .config import read_hub_model
from .names import NAMINGS, Home, Naming, named
from .tensor_files import FLOATS, TensorFiles, open_tensor_files

_SHOWN = 20


def _ignore(_told: str) -> None:
    pass


def read_weights(folder: str | Path, shapes: Any, *, say: Callable[[str], object] = _ignore) -> Any:
    """Return the parameters of a Hugging Face folder as arrays of the given shapes, types and shardings.

    Every device reads its slices of the files, converts them to the wanted type and keeps them; on the host there is
    one device's part of one parameter at a time.

    Args:
        shapes: a tree {"embed", "blocks", "head"} of `jax.ShapeDtypeStruct` with shardings, shaped like the parameters
            of a `Transformer`; blocks are [L, ...].
        say: told where the folder says two things, and which of them was taken.

    Raises:
        WeightsError: the files are broken, or tensors are missing, unknown or of another shape; nothing was read.
    """
    source = open_weights(folder, shapes)
    for warning in source.warnings:
        # It quotes names that the files have.
        say(printable(f"warning   {folder}: {warning}", limit=1_000))

    def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return _read_leaf(source, jax.tree_util.keystr(path, simple=True, separator="."), leaf)

    return jax.tree_util.tree_map_with_path(read, shapes)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder whose tensors are those of a model: where each parameter lives, and what names begin with.

    `warnings` is where config.json or the files say two things, a line each.
    """

    files: TensorFiles
    homes: dict[str, Home]
    prefix: str
    warnings: tuple[str, ...]


def open_weights(folder: str | Path, shapes: Any) -> Source:
    """Return the files of a folder, once their headers are known to hold parameters of these shapes; no weight is read.

    Raises:
        WeightsError: everything that is wrong, in one list.
    """
    model = read_hub_model(folder)
    naming = NAMINGS[model.architecture]
    files = open_tensor_files(folder)
    has_prefix = any(name.startswith(naming.prefix) for name in (*files.shapes, *files.lost))
    prefix = naming.prefix if has_prefix else ""
    homes = named(naming, shapes)
    table = homes["embed.table"]
    if "head.table" not in homes and prefix + table.name not in files.shapes and naming.head in files.shapes:
        # One table under the other of its two names.
        homes["embed.table"] = replace(table, name=naming.head)
    mistakes = [*files.mistakes, *_compare(files, naming, homes, shapes, prefix)]
    if model.config.embeddings == "untied" and "head.table" not in homes:
        mistakes.append(f"{naming.head} is a table of its own, and the model that was asked for has none")
    if mistakes:
        more = [f"and {len(mistakes) - _SHOWN} more"] if len(mistakes) > _SHOWN else []
        lines = [f"{folder} does not hold what its config.json says:", *mistakes[:_SHOWN], *more]
        raise WeightsError("\n  ".join(lines), fix="copy the folder again, whole.")
    return Source(files=files, homes=homes, prefix=prefix, warnings=(*model.warnings, *files.warnings))


def _compare(files: TensorFiles, naming: Naming, homes: dict[str, Home], shapes: Any, prefix: str) -> Iterator[str]:
    wanted = _wanted_shapes(homes, shapes, prefix)
    # That tensors of a damaged file are missing is no news.
    for name in sorted(wanted.keys() - files.shapes.keys() - files.lost):
        yield f"{name} {list(wanted[name])} is missing"
    for name in sorted(wanted.keys() & files.shapes.keys()):
        if files.shapes[name] != wanted[name]:
            yield f"{name} is {list(files.shapes[name])}, not {list(wanted[name])}"
        if files.dtypes[name] not in FLOATS:
            yield f"{name} is of type {files.dtypes[name]}, not {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
    for name in sorted(files.shapes.keys() - wanted.keys()):
        is_known = name.endswith(naming.ignored) if naming.ignored else False
        if not is_known and name != naming.head:
            yield f"{name} {list(files.shapes[name])} is not known"
    yield from _compare_head(files, naming, homes, wanted, prefix)


def _compare_head(
    files: TensorFiles, naming: Naming, homes: dict[str, Home], wanted: dict[str, tuple[int, ...]], prefix: str
) -> Iterator[str]:
    """A tied model may hold its table a second time, but no other one."""
    table = wanted[_full(homes["embed.table"].name, prefix)]
    if "head.table" in homes or naming.head not in files.shapes:
        return
    if (shape := files.shapes[naming.head]) != table:
        yield f"{naming.head} is {list(shape)}, not {list(table)}"
    if files.dtypes[naming.head] not in FLOATS:
        yield f"{naming.head} is of type {files.dtypes[naming.head]}, not {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"


def _wanted_shapes(homes: dict[str, Home], shapes: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    wanted = {}
    for (path, home), leaf in zip(homes.items(), jax.tree.leaves(shapes), strict=True):
        is_stacked = path.startswith("blocks.")
        for layer in range(leaf.shape[0] if is_stacked else 1):
            name = _full(home.name.format(layer=layer), prefix)
            wanted[name] = home.shape(tuple(leaf.shape[1:] if is_stacked else leaf.shape))
    return wanted


def _full(name: str, prefix: str) -> str:
    return name if name == "lm_head.weight" else prefix + name


def _read_leaf(source: Source, path: str, leaf: Any) -> jax.Array:
    groups: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        own = tuple(one.indices(size)[:2] for one, size in zip(index, leaf.shape, strict=True))
        groups.setdefault(own, []).append(device)
    arrays = []
    # By hand, since jax.make_array_from_callback holds the parts of all devices on the host before it sends the first.
    for bounds, devices in groups.items():
        block = _read_block(source, path, [slice(*own) for own in bounds], leaf.dtype)
        arrays += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _read_block(source: Source, path: str, index: list[slice], dtype: Any) -> np.ndarray:
    """A block of a parameter in the wanted type, of [L, ...] one layer after the other."""
    home, is_stacked = source.homes[path], path.startswith("blocks.")
    own = tuple(index[1:] if is_stacked else index)
    layers = range(index[0].start, index[0].stop) if is_stacked else range(1)
    block = np.empty((len(layers), *(one.stop - one.start for one in own)), dtype)
    for place, layer in zip(block, layers, strict=True):
        name = _full(home.name.format(layer=layer), source.prefix)
        piece = source.files.read(name, home.index(own, source.files.shapes[name]))
        place[...] = piece.T if home.layout == "transposed" else piece
    return block if is_stacked else block[0]
