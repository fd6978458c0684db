"""Inspect a compiled program: memory, traffic and work on each device, as a report.

`inspect_compiled` works for any jitted function. `../commands/inspect.py` compiles the training step of a config and
prints its report. Read `hlo.py` next.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ..meshes.notebook import picture_html, text_html
from .collectives import Collective, list_collectives
from .execution_counts import count_executions
from .hardware import Hardware
from .hlo import HloModule
from .memory import Memory, count_memory
from .roofline import roofline_times_s
from .timeline.schedule_report import ScheduleReport, read_schedule
from .traffic import Traffic, sum_traffic
from .work import CLASSES, UNITS, Work, WorkClass, count_work


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """The costs of one run of a program per device.

    `flops`, `model_flops` and `recompute_flops` are means over the devices; memory, traffic and `roofline` are maxima.
    `roofline` has the share of each class in the time at peak rates, and `step_bound_s` the sum of these times; both
    are empty without hardware. `schedule` is empty on CPU, where nothing overlaps. `notes` names counts that are not
    exact. Numbers that are not in the program itself (model flops, bubble, compile time) are None until the caller
    sets them.
    """

    target: str
    devices: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops: Mapping[str, float]
    moved_bytes: Mapping[str, float]
    roofline: Mapping[str, float]
    step_bound_s: float | None
    schedule: ScheduleReport
    hlo_instructions: int
    compile_s: float | None = None
    model_flops: float | None = None
    recompute_flops: float | None = None
    bubble_fraction: float | None = None
    notes: tuple[str, ...] = ()
    collectives: tuple[Collective, ...] = field(default=(), repr=False)

    @property
    def fits(self) -> bool | None:
        """Whether the program fits the device, None if unknown; `memory.verdict` also considers XLA's limit."""
        return None if self.memory.free is None else self.memory.free >= 0

    def _repr_html_(self) -> str:
        """Return the picture and the tables of the report as HTML, which a notebook shows."""
        # At the top of the file this would be a circle: both files import `ProgramReport`.
        from . import draw_report, format_report

        return picture_html(draw_report(self), format="png", alt=self.target) + text_html(format_report(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {
            "target": self.target,
            "devices": self.devices,
            "memory_bytes": asdict(self.memory),
            "fits": self.fits,
            "verdict": self.memory.verdict,
            "traffic": [asdict(row) for row in self.traffic],
            "flops": dict(self.flops),
            "model_flops": self.model_flops,
            "recompute_flops": self.recompute_flops,
            "roofline": dict(self.roofline),
            **self.schedule.to_dict(),
            "bubble_fraction": self.bubble_fraction,
            "hlo_instructions": self.hlo_instructions,
            "compile_s": self.compile_s,
        }


def inspect_compiled(
    compiled: Any,
    mesh: Mesh,
    *,
    parameters: Any = None,
    gradients: Any = None,
    optimizer: Any = None,
    minimum_bytes: Mapping[str, float] | None = None,
    hardware: Hardware | None = None,
    devices_per_node: int | None = None,
) -> ProgramReport:
    """Return the report of a compiled function, which `jax.jit(f).lower(...).compile()` makes.

    >>> inspect_compiled(compiled, mesh, parameters=params).memory.total
    22777256

    Args:
        mesh: that for which it was compiled; the traffic is named after its axes.
        parameters, optimizer, gradients: trees of arguments, and of gradients that are split otherwise, to tell memory.
        minimum_bytes: the least bytes to send by axes, as of `trellax.plan.minimum_bytes`.
        hardware, devices_per_node: peaks of a device; devices that share a node, all of them by default.
    """
    counts = _count(compiled, mesh)
    machine: Any = {"hardware": hardware, "devices_per_node": devices_per_node}
    times_s = _bound_times(counts.work, counts.collectives, mesh=mesh, **machine)
    state = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    return ProgramReport(
        target=f"{mesh.devices.flat[0].device_kind}:{mesh.devices.size}",
        devices=mesh.devices.size,
        memory=count_memory(compiled, counts.program, hardware=hardware, **state),
        traffic=sum_traffic(counts.collectives, minimum=minimum_bytes),
        flops={unit: float(np.mean(counts.work.flops(unit))) for unit in UNITS},
        moved_bytes={kind: float(np.mean(counts.work.moved_bytes(kind))) for kind in CLASSES},
        roofline={kind: time_s / sum(times_s.values()) for kind, time_s in times_s.items()},
        step_bound_s=sum(times_s.values()) or None,
        schedule=read_schedule(counts.program, counts.collectives, counts.work, mesh=mesh, **machine),
        hlo_instructions=counts.program.num_instructions,
        notes=(*counts.notes, *_describe_uncounted(counts.work)),
        collectives=counts.collectives,
    )


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """A parsed program, its collectives and work, and notes on counts that are not exact."""

    program: HloModule
    collectives: tuple[Collective, ...]
    work: Work
    notes: tuple[str, ...]


def _count(compiled: Any, mesh: Mesh) -> _Counts:
    program = HloModule.parse(hlo_text(compiled))
    executions = count_executions(program, num_devices=mesh.devices.size)
    return _Counts(
        program=program,
        collectives=list_collectives(program, executions, mesh=mesh),
        work=count_work(program, executions, num_devices=mesh.devices.size),
        notes=executions.notes,
    )


def _bound_times(
    work: Work,
    collectives: tuple[Collective, ...],
    *,
    hardware: Hardware | None,
    mesh: Mesh,
    devices_per_node: int | None,
) -> dict[WorkClass, float]:
    """Return seconds by class; empty without hardware, or if no class takes time."""
    if hardware is None:
        return {}
    nodes = devices_per_node or mesh.devices.size
    times = roofline_times_s(work.operations, collectives, hardware=hardware, mesh=mesh, devices_per_node=nodes)
    return times if sum(times.values()) else {}


def hlo_text(compiled: Any) -> str:
    """Return the program's HLO text with all constants, which include the tables of a pipeline schedule.

    `compiled.as_text()` omits large constants; it is the fallback if jaxlib's printer is not available.
    """
    try:
        from jaxlib import _hlo

        options = _hlo.HloPrintOptions()
        options.print_large_constants = True
        (module,) = compiled.runtime_executable().hlo_modules()
        return module.to_string(options)
    except (ImportError, AttributeError, ValueError):
        return compiled.as_text()


def _describe_uncounted(work: Work) -> tuple[str, ...]:
    return tuple(f"the flops of the library call {name!r} are not counted." for name in work.uncounted)
