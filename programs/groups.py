"""Parse the device groups of a collective, in every notation of XLA, and find the mesh axes along which they run.

The groups {0,1} and {2,3} of four devices are written in one of these ways:

    replica_groups={{0,1},{2,3}}                          lists
    replica_groups=[2,2]<=[4]                             0 to 3 in rows of 2
    replica_groups=[2,2]<=[2,2]T(1,0)                     of the transposed numbers: {0,2} and {1,3}
    replica_groups=mesh['a'=2,'b'=2] {'b'}                lines along axis b of a mesh
    replica_groups=mesh['a'=4] {'a':(2)2}                 part of axis a: pre-size 2, size 2
    source_target_pairs={{0,1},{2,3}}                     of a permute

A mesh may state `device_ids=(...)`, the order of its devices. Read `collectives.py` next.
"""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from .hlo import Instruction

Groups = tuple[tuple[int, ...], ...]
"""Partition numbers by group; for a permute, pairs of source and target."""

UNATTRIBUTED = "unattributed"
"""The axis of groups that run along no combination of mesh axes."""

_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_EMPTY = re.compile(r"replica_groups=\{\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?|[^)]*)\))? "
    r"\{([^}]*)\}"
)
_SUB_AXIS = re.compile(r"'?([^':]+)'?(?::\((\d+)\)(\d+))?$")


def read_groups(instruction: Instruction, *, num_devices: int) -> Groups | None:
    """Return the groups of a collective, or None if their notation is unknown."""
    text = instruction.attributes
    if found := _LISTS.search(text):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if _EMPTY.search(text):
        # No list of groups: all devices form one.
        return (tuple(range(num_devices)),)
    if found := _IOTA.search(text):
        ids = _iota(found[2], found[3])
        return tuple(map(tuple, ids.reshape(_numbers(found[1])).tolist()))
    if found := _MESH.search(text):
        return _read_mesh(found[1], found[2], found[3])
    return None


def axis_of_groups(groups: Groups | None, *, axes: Sequence[str], shape: Sequence[int]) -> str:
    """Return the mesh axes along which groups run, such as `data` or `pipe+data`, or else `unattributed`.

    The groups must be all lines (planes, ...) along these axes. Groups that are parts of the lines along one axis are
    `part of data`. On a mesh data=2, tensor=2 of the devices 0 1 / 2 3:

        {0,1} {2,3}    tensor          {0,2} {1,3}    data
        {0,1,2,3}      data+tensor     {0,3} {1,2}    unattributed: both axes change, but not all devices meet

    Args:
        axes, shape: names and sizes of the mesh's axes; device i is number i in row-major order.
    """
    moving = _moving_axes(groups, axes, shape)
    if groups is None or not moving:
        return UNATTRIBUTED
    if set(map(frozenset, groups)) == _lines([axes.index(axis) for axis in moving], shape):
        return "+".join(moving)
    return f"part of {moving[0]}" if len(moving) == 1 else UNATTRIBUTED


def axis_of_pairs(pairs: Groups | None, *, axes: Sequence[str], shape: Sequence[int]) -> str:
    """Return the one mesh axis along which all pairs of a permute stay, or `unattributed`."""
    moving = _moving_axes(pairs, axes, shape)
    return moving[0] if len(moving) == 1 else UNATTRIBUTED


def _moving_axes(groups: Groups | None, axes: Sequence[str], shape: Sequence[int]) -> list[str]:
    """Return the axes on which members of a group differ, in the order of the mesh."""
    if groups is None or any(device >= math.prod(shape) for group in groups for device in group):
        return []
    moving: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, shape))
        moving |= {axis for axis, row in zip(axes, places, strict=True) if len(set(row.tolist())) > 1}
    return [axis for axis in axes if axis in moving]


def _lines(moving: Sequence[int], shape: Sequence[int]) -> set[frozenset[int]]:
    """Return the groups of devices that differ in these axes only."""
    fixed = [axis for axis in range(len(shape)) if axis not in moving]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose([*fixed, *moving])
    return set(map(frozenset, ids.reshape(-1, math.prod(shape[axis] for axis in moving)).tolist()))


def _read_mesh(sizes_text: str, ids_text: str | None, axes_text: str) -> Groups | None:
    """Parse `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`: groups along the named axes, or parts of them.

    Every axis is cut into sub-axes, of which the named ones vary within a group and the others between groups. For
    example {'a':(2)2} of a mesh 'a'=8 cuts a into sizes 2 x 2 x 2, of which the middle one is named: the groups are
    {0,2}, {1,3}, {4,6} and {5,7}.
    """
    pairs = [part.rpartition("=") for part in sizes_text.split(",")]
    names, sizes = [name.strip(" '") for name, _, _ in pairs], [int(size) for _, _, size in pairs]
    ids = _read_ids(ids_text, math.prod(sizes))
    if ids is None:
        return None
    # Axis -> its named parts, each as (product of the sizes before it, own size); the whole axis is (1, size).
    wanted: dict[str, list[tuple[int, int]]] = {}
    for word in axes_text.split(","):
        found = _SUB_AXIS.match(word.strip())
        if found is None or found[1] not in names:
            return None
        whole = sizes[names.index(found[1])]
        wanted.setdefault(found[1], []).append((int(found[2] or 1), int(found[3] or whole)))
    # All sub-axes of the mesh in order, each as (axis, product of the sizes before it, own size).
    dims: list[tuple[str, int, int]] = []
    for name, size in zip(names, sizes, strict=True):
        dims += [(name, before, part) for before, part in _cut(size, sorted(wanted.get(name, [])))]
    inner = [dims.index((name, *part)) for name, parts in wanted.items() for part in parts]
    outer = [place for place in range(len(dims)) if place not in inner]
    # Named parts last, so that each row of the flattened array is one group.
    by_group = ids.reshape([part for _, _, part in dims]).transpose([*outer, *inner])
    return tuple(map(tuple, by_group.reshape(-1, math.prod(dims[place][2] for place in inner)).tolist()))


def _cut(size: int, parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut an axis into sub-axes, as (product of the sizes before it, own size): `parts` and the remainders between.

    An axis of 8 with the part (2, 2) is cut into (1, 2), (2, 2) and (4, 2).
    """
    cut, done = [], 1
    for before, own in parts:
        if before > done:
            cut.append((done, before // done))
        cut.append((before, own))
        done = before * own
    return [*cut, (done, size // done)] if done < size or not cut else cut


def _read_ids(text: str | None, num_devices: int) -> np.ndarray | None:
    """Read device numbers in the order of the mesh: an iota, a transposed iota, or a list."""
    if text is None:
        return np.arange(num_devices)
    if found := re.match(r"\[([\d,]+)\](?:<=\[[\d,]+\])?(?:T\(([\d,]+)\))?$", text):
        return _iota(found[1], found[2]).ravel()
    listed = [int(word) for word in re.findall(r"\d+", text)]
    return np.array(listed) if len(listed) == num_devices else None


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Return the numbers from 0 in an array of these sizes, transposed if an order is given."""
    shape = _numbers(sizes)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]
