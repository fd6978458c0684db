"""Layers of several kinds in one stack, such as dense and expert layers in turn.

    pattern ("dense", "moe"), 6 layers, 2 ranks             rank 0                rank 1
                                                            dense moe dense       moe dense moe
    parameters of a kind [chunks, ranks, room, ...]  dense  0 1                   0 .
                                                     moe    0 .                   0 1

Each kind has arrays of its own with room for as many layers as any stage has of it; `.` is padding, never run. Read
`stage.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...meshes import ScheduleError
from ...meshes.errors import suggest

Table = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, kw_only=True)
class StagePattern:
    """The kind of every layer of every stage, and its place among the layers of its kind on that stage.

    kinds: names of the kinds, in order of the parameters' tree.
    counts: number of layers of each stage, first to last.
    kind_of, place_of: int32 [stages, most layers of a stage]; a kind by its position in `kinds`.
    """

    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    kind_of: Table
    place_of: Table

    def counts_of(self, kind: str) -> list[int]:
        """Return how many layers of a kind each stage has."""
        number = self.kinds.index(kind)
        return [int((row[:count] == number).sum()) for row, count in zip(self.kind_of, self.counts, strict=True)]

    @property
    def is_sorted(self) -> bool:
        """Whether every stage has all layers of the first kind, then all of the second, and so on."""
        return all((np.diff(row[:count]) >= 0).all() for row, count in zip(self.kind_of, self.counts, strict=True))


def stage_pattern(pattern: Sequence[str], *, kinds: Sequence[str], counts: Sequence[int]) -> StagePattern:
    """Return the pattern on stages of `counts` layers: the layer l of the model is of kind pattern[l % len(pattern)].

    Raises:
        ScheduleError: the pattern is empty, or names a kind that there is not.
    """
    if not pattern:
        raise ScheduleError("pattern is empty.", fix='name the kinds of layers in order: pattern=("dense", "moe").')
    for kind in pattern:
        if kind not in kinds:
            raise ScheduleError(
                f"pattern names the kind {kind!r}, but layer has {', '.join(kinds)}.{suggest(kind, list(kinds))}",
                fix="name the kinds that StageFns(layer={...}) has.",
            )
    # Stages with fewer layers than the largest end with zeros, which are never read.
    kind_of = np.zeros((len(counts), max(counts)), np.int32)
    place_of = np.zeros_like(kind_of)
    layer = 0
    for stage, count in enumerate(counts):
        seen = dict.fromkeys(kinds, 0)
        for index in range(count):
            kind = pattern[layer % len(pattern)]
            kind_of[stage, index], place_of[stage, index] = list(kinds).index(kind), seen[kind]
            seen[kind] += 1
            layer += 1
    return StagePattern(kinds=tuple(kinds), counts=tuple(counts), kind_of=kind_of, place_of=place_of)
