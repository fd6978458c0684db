"""The modelled time of a step, and by axis the communication that no product hides.

Bytes are counted from the schedule: a collective is exposed if no matrix product starts between its start and its end.
Seconds are those of the model (`efficiencies.py`, `simulate.py`): a collective may enclose products and still take
longer than they do, or enclose none and be hidden by vector work.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ..collectives import Collective
from ..hardware import Hardware
from ..hlo import HloModule
from ..work import Work
from .efficiencies import kernel_times_s, transfers
from .overlap import Span
from .simulate import EXPOSED, LAUNCHES, WAITING, simulate


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """The collectives over an axis: runs and bytes of the busiest device, those that enclose no product among them.

    `transfer_s` are the seconds of all transfers, and `exposed_s` those until whose end a device does nothing, on the
    device of `StepTime`; None without hardware.
    """

    axis: str
    count: int
    exposed_count: int
    bytes: float
    exposed_bytes: float
    transfer_s: float | None = None
    exposed_s: float | None = None

    @property
    def share(self) -> float:
        """Share of the bytes that enclose no product."""
        return self.exposed_bytes / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What the device that waits least spends a step on, in seconds by the model; all parts add up to `total_s`."""

    matrix_s: float
    vector_s: float
    launches_s: float
    exposed_s: float
    waiting_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.matrix_s + self.vector_s + self.launches_s + self.exposed_s + self.waiting_s


def model_time(
    program: HloModule,
    collectives: tuple[Collective, ...],
    work: Work,
    *,
    hardware: Hardware,
    mesh: Mesh,
    devices_per_node: int,
) -> tuple[StepTime, Mapping[str, tuple[float, float]]]:
    """Return the modelled time of a step, and by axis the seconds of all transfers and those exposed."""
    runs = transfers(program, collectives, hardware=hardware, mesh=mesh, devices_per_node=devices_per_node)
    kernels_s = kernel_times_s(program, work.operations, hardware)
    spent = simulate(program, kernels_s=kernels_s, transfers=runs, num_devices=mesh.devices.size)
    device = int(np.argmin(spent[WAITING]))
    seconds = {what: float(times[device]) for what, times in spent.items()}
    by_axis: dict[str, tuple[float, float]] = {}
    for one in collectives:
        before = by_axis.get(one.axis, (0.0, 0.0))[0]
        sent_s = float(one.count[device] * runs[one.name].seconds[device])
        by_axis[one.axis] = (before + sent_s, seconds.get(EXPOSED + one.axis, 0.0))
    step = StepTime(
        matrix_s=seconds.get("matrix", 0.0),
        vector_s=seconds.get("vector", 0.0),
        launches_s=seconds.get(LAUNCHES, 0.0) + seconds.get("control", 0.0),
        exposed_s=sum(time_s for _, time_s in by_axis.values()),
        waiting_s=seconds[WAITING],
    )
    return step, by_axis


def sum_exposed(
    collectives: Iterable[Collective],
    spans: Iterable[Span],
    *,
    seconds: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Exposed, ...]:
    """Return a row for each axis, the axis with most exposed bytes first.

    Args:
        seconds: of all transfers and of those exposed, by axis, from `model_time`.
    """
    hidden = {span.collective.name for span in spans if span.products}
    found = list(collectives)
    axes = dict.fromkeys(one.axis for one in found)
    rows = [_row(axis, [one for one in found if one.axis == axis], hidden, (seconds or {}).get(axis)) for axis in axes]
    return tuple(sorted(rows, key=lambda row: -row.exposed_bytes))


def _row(axis: str, collectives: list[Collective], hidden: set[str], times: tuple[float, float] | None) -> Exposed:
    open_ones = [one for one in collectives if one.name not in hidden]
    sent = np.sum([one.sent_bytes for one in collectives], axis=0)
    device = int(np.argmax(sent))
    return Exposed(
        axis=axis,
        count=int(sum(one.count[device] for one in collectives)),
        exposed_count=int(sum(one.count[device] for one in open_ones)),
        bytes=float(sent[device]),
        exposed_bytes=float(sum(one.sent_bytes[device] for one in open_ones)),
        transfer_s=None if times is None else times[0],
        exposed_s=None if times is None else times[1],
    )
