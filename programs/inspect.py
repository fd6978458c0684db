"""A compiled program as a report: what it keeps, sends and computes on each device, from the program itself.

`inspect_compiled` reads any jitted function's; `../commands/inspect.py` compiles a run's training step and prints
the report. Read `hlo.py` next.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from .collectives import Collective, list_collectives
from .executions import count_executions
from .hardware import Hardware
from .hlo import Program
from .memory import Memory, count_memory
from .roofline import roofline_times_s
from .traffic import Traffic, sum_traffic
from .work import CLASSES, UNITS, Class, Work, count_work


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What a program costs on each device in one run.

    `flops`, `model_flops` and `recompute_flops` are means over the devices; memory, traffic and `roofline` are those of
    the device with most. `roofline` has each class's share of the time that peaks allow, `step_bound_s` their sum;
    both are empty without hardware. `notes` say what could only be bounded. What a program cannot know of itself (model
    flops, bubble, compile time) is None until somebody fills it in.
    """

    target: str
    devices: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    flops: Mapping[str, float]
    moved_bytes: Mapping[str, float]
    roofline: Mapping[str, float]
    step_bound_s: float | None
    hlo_instructions: int
    compile_s: float | None = None
    model_flops: float | None = None
    recompute_flops: float | None = None
    bubble_fraction: float | None = None
    notes: tuple[str, ...] = ()
    collectives: tuple[Collective, ...] = field(default=(), repr=False)

    @property
    def fits(self) -> bool | None:
        """Whether the program fits the device; `memory.verdict` tells XLA's own limit too. None where not known."""
        return None if self.memory.free is None else self.memory.free >= 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
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
            "bubble_fraction": self.bubble_fraction,
            "hlo_instructions": self.hlo_instructions,
            "compile_s": self.compile_s,
        }


def inspect_compiled(
    compiled: Any,
    mesh: Mesh,
    *,
    parameters: Any = None,
    optimizer: Any = None,
    minimum_bytes: Mapping[str, float] | None = None,
    hardware: Hardware | None = None,
    devices_per_node: int | None = None,
) -> ProgramReport:
    """Return the report of a compiled function: `jax.jit(f).lower(...).compile()`.

    >>> inspect_compiled(compiled, mesh, parameters=params).memory.total
    22777256

    Args:
        mesh: the mesh whose devices it was compiled for; its axes name the traffic.
        parameters, optimizer: trees of its arguments, to tell them and gradients apart in memory.
        minimum_bytes: what must be sent at least, by axes (see `../plan/costs/minimum_traffic.py`).
        hardware: the device, for capacity and roofline.
        devices_per_node: all of them if left out.
    """
    program = Program.parse(hlo_text(compiled))
    executions = count_executions(program, num_devices=mesh.devices.size)
    collectives = list_collectives(program, executions, mesh=mesh)
    work = count_work(program, executions, num_devices=mesh.devices.size)
    times_s = _bound_times(work, collectives, hardware, mesh, devices_per_node)
    return ProgramReport(
        target=f"{mesh.devices.flat[0].device_kind}:{mesh.devices.size}",
        devices=mesh.devices.size,
        memory=count_memory(compiled, program, parameters=parameters, optimizer=optimizer, hardware=hardware),
        traffic=sum_traffic(collectives, minimum=minimum_bytes),
        flops={unit: float(np.mean(work.flops(unit))) for unit in UNITS},
        moved_bytes={kind: float(np.mean(work.moved_bytes(kind))) for kind in CLASSES},
        roofline={kind: time_s / sum(times_s.values()) for kind, time_s in times_s.items()},
        step_bound_s=sum(times_s.values()) or None,
        hlo_instructions=program.num_instructions,
        notes=(*executions.notes, *_describe_uncounted(work)),
        collectives=collectives,
    )


def _bound_times(
    work: Work, collectives: tuple[Collective, ...], hardware: Hardware | None, mesh: Mesh, devices_per_node: int | None
) -> dict[Class, float]:
    """Seconds by class, nothing without hardware or where nothing takes time."""
    if hardware is None:
        return {}
    nodes = devices_per_node or mesh.devices.size
    times = roofline_times_s(work.operations, collectives, hardware=hardware, mesh=mesh, devices_per_node=nodes)
    return times if sum(times.values()) else {}


def hlo_text(compiled: Any) -> str:
    """Return the program's HLO with all its constants, on which the tables of a pipeline schedule depend.

    `compiled.as_text()` leaves large constants out; where jaxlib's printer cannot be reached, that is what is returned.
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
