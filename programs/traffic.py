"""Sum the traffic of a step by mesh axes and kind of collective, beside the least that must be sent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .collectives import Collective

EVERY_KIND = "all kinds"
"""The `kind` of the row with the sum over all kinds, which also has the minimum."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Number of collectives and bytes that the busiest device sends over an axis in a step.

    `minimum_bytes` and `ratio` are set only in the row of all kinds of an axis, if its minimum is known.
    """

    axis: str
    kind: str
    count: int
    bytes: float
    minimum_bytes: float | None
    ratio: float | None


def sum_traffic(
    collectives: Iterable[Collective], *, minimum: Mapping[str, float] | None = None
) -> tuple[Traffic, ...]:
    """Return one row per axis and kind, and one for all kinds of each axis; the axis with most bytes comes first.

    Axes that occur only in the minimum have a row too.
    """
    found = list(collectives)
    axes = dict.fromkeys([collective.axis for collective in found] + list(minimum or ()))
    rows: list[Traffic] = []
    for axis in sorted(axes, key=lambda axis: -_busiest([c for c in found if c.axis == axis])[1]):
        own = [collective for collective in found if collective.axis == axis]
        kinds = dict.fromkeys(collective.kind for collective in own)
        rows += [_row(axis, kind, [c for c in own if c.kind == kind], None) for kind in kinds]
        rows.append(_row(axis, EVERY_KIND, own, None if minimum is None else minimum.get(axis, 0.0)))
    return tuple(rows)


def _row(axis: str, kind: str, collectives: list[Collective], least: float | None) -> Traffic:
    count, sent_bytes = _busiest(collectives)
    ratio = sent_bytes / least if least else None
    return Traffic(axis=axis, kind=kind, count=count, bytes=sent_bytes, minimum_bytes=least, ratio=ratio)


def _busiest(collectives: list[Collective]) -> tuple[int, float]:
    """Return the number of collectives and bytes of the device that sends most."""
    if not collectives:
        return 0, 0.0
    sent = np.sum([collective.sent_bytes for collective in collectives], axis=0)
    device = int(np.argmax(sent))
    return int(sum(collective.count[device] for collective in collectives)), float(sent[device])
