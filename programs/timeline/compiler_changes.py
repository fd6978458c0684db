"""Name what XLA did to a GPU program by itself: collectives made synchronous, and values computed again.

XLA makes a collective synchronous where its scheduler puts nothing between start and end: because the next line needs
the result, or because the program is over its memory limit. Over the limit it also computes values again rather than
keep them; the names of such instructions have `.remat` in them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..collectives import Collective
from ..places import shorten_place
from ..work import Operation
from .overlap import Span

_MARK = ".remat"


@dataclass(frozen=True, kw_only=True)
class SynchronousCollective:
    """Collectives of one place that nothing runs beside: number of runs, and bytes that the busiest device sends."""

    place: str
    kind: str
    axis: str
    count: int
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Instructions of one place that XLA added: runs, flops and moved bytes on the busiest device."""

    place: str
    count: int
    flops: float
    moved_bytes: float


def list_synchronous(collectives: Iterable[Collective], spans: Iterable[Span]) -> tuple[SynchronousCollective, ...]:
    """Return the places of synchronous collectives, that with most bytes first."""
    names = {span.collective.name for span in spans if span.end is None}
    found: dict[tuple[str, str, str], SynchronousCollective] = {}
    for one in collectives:
        if one.name not in names:
            continue
        key = shorten_place(one.op_name), one.kind, one.axis
        device = int(one.sent_bytes.argmax())
        before = found.get(key)
        found[key] = SynchronousCollective(
            place=key[0],
            kind=one.kind,
            axis=one.axis,
            count=int(one.count[device]) + (before.count if before else 0),
            bytes=float(one.sent_bytes[device]) + (before.bytes if before else 0.0),
        )
    return tuple(sorted(found.values(), key=lambda one: -one.bytes))


def list_recomputed(operations: Iterable[Operation]) -> tuple[Recomputed, ...]:
    """Return the places of instructions that XLA computes again by itself, that which moves most bytes first."""
    found: dict[str, Recomputed] = {}
    for one in _marked(operations):
        place = shorten_place(one.op_name) or one.name
        count = int(one.count.max())
        before = found.get(place, Recomputed(place=place, count=0, flops=0.0, moved_bytes=0.0))
        found[place] = Recomputed(
            place=place,
            count=before.count + count,
            flops=before.flops + count * (one.matrix_flops + one.vector_flops),
            moved_bytes=before.moved_bytes + count * one.moved_bytes,
        )
    return tuple(sorted(found.values(), key=lambda one: -one.moved_bytes))


def _marked(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Yield the instructions that XLA added and that move bytes."""
    for one in operations:
        if _MARK in one.name and one.moved_bytes:
            yield one
