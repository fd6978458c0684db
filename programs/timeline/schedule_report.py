"""What the schedule of a GPU program says: exposed communication, the modelled step, and what XLA did by itself."""

from dataclasses import asdict, dataclass
from typing import Any

from jax.sharding import Mesh

from ..collectives import Collective
from ..hardware import Hardware
from ..hlo import HloModule
from ..work import Work
from .compiler_changes import Recomputed, SynchronousCollective, list_recomputed, list_synchronous
from .exposed import Exposed, StepTime, model_time, sum_exposed
from .overlap import list_spans


@dataclass(frozen=True, kw_only=True)
class ScheduleReport:
    """Exposed communication by axis, the modelled time of a step (None without hardware), and XLA's own changes.

    All is empty for CPU programs, in which nothing overlaps.
    """

    exposed: tuple[Exposed, ...] = ()
    step_time: StepTime | None = None
    synchronous: tuple[SynchronousCollective, ...] = ()
    recomputed: tuple[Recomputed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        step = self.step_time
        return {
            "exposed": [{**asdict(row), "share": row.share} for row in self.exposed],
            "step_time_s": None if step is None else {**asdict(step), "total_s": step.total_s},
            "synchronous": [asdict(one) for one in self.synchronous],
            "recomputed": [asdict(one) for one in self.recomputed],
        }


def read_schedule(
    program: HloModule,
    collectives: tuple[Collective, ...],
    work: Work,
    *,
    hardware: Hardware | None,
    mesh: Mesh,
    devices_per_node: int | None,
) -> ScheduleReport:
    """Return the report on the schedule of a program, empty for one that is compiled for CPU."""
    if mesh.devices.flat[0].platform == "cpu":
        return ScheduleReport()
    spans = [span for _, span in list_spans(program)]
    step, seconds = None, None
    if hardware is not None:
        nodes = devices_per_node or mesh.devices.size
        step, seconds = model_time(program, collectives, work, hardware=hardware, mesh=mesh, devices_per_node=nodes)
    return ScheduleReport(
        exposed=sum_exposed(collectives, spans, seconds=seconds),
        step_time=step,
        synchronous=list_synchronous(collectives, spans),
        recomputed=list_recomputed(work.operations),
    )
