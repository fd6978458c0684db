"""What a run tells people before it starts: mesh, parameters with their shardings, schedule with its bubble."""

from dataclasses import dataclass

from ..meshes import mesh_sizes, sharding_table
from ..pipeline import Schedule, simulate
from .state import Setup

_WIDEST_GRID = 100


@dataclass(frozen=True, kw_only=True)
class Report:
    """The parts of the report as texts, and its numbers for scripts."""

    mesh: str
    parameters: str
    schedule: str
    numbers: dict[str, object]

    def __str__(self) -> str:
        return f"{self.mesh}\n\n{self.parameters}\n\n{self.schedule}"


def describe(setup: Setup) -> Report:
    """Return what a run will do, from shapes alone: nothing is allocated."""
    table = sharding_table(setup.model.params)
    timing = simulate(setup.schedule)
    devices = setup.mesh.devices.ravel()
    sizes = mesh_sizes(setup.mesh)
    return Report(
        mesh=f"mesh      {sizes}: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        parameters=str(table),
        schedule=draw_schedule(setup.schedule),
        numbers={
            "mesh": str(sizes),
            "devices": len(devices),
            "parameters": [
                {"name": r.name, "shape": r.shape, "bytes": r.total_bytes, "device_bytes": r.device_bytes}
                for r in table.rows
            ],
            "device_bytes": table.device_bytes,
            "schedule": setup.schedule.name,
            "bubble_fraction": timing.bubble_fraction,
            "peak_in_flight": list(timing.peak_in_flight),
        },
    )


def draw_schedule(schedule: Schedule) -> str:
    """Return the grid of a schedule, as wide as fits, over a line with its bubble and what it holds."""
    if schedule.num_ranks == 1:
        return f"schedule  one stage, microbatches one after another ({schedule.num_microbatches}): no bubble"
    timing = simulate(schedule)
    head = (
        f"schedule  {schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches, bubble "
        f"{timing.bubble_fraction:.1%} of the time, in flight per rank {', '.join(map(str, timing.peak_in_flight))}"
    )
    lines = str(schedule).splitlines()
    is_wide = len(lines[0]) > _WIDEST_GRID
    grid = [f"{line[:_WIDEST_GRID]} ..." if is_wide else line for line in lines]
    return "\n".join([head, *grid])
