"""Count what one tick of a compiled program of an engine moves, starts and sends. Read `report.py` for the caller."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ...programs import Hardware, Traffic, hlo_text
from ...programs.collectives import Collective, list_collectives
from ...programs.execution_counts import Assumed, count_executions, scopes_of
from ...programs.hlo import HloModule
from ...programs.roofline import roofline_times_s
from ...programs.traffic import sum_traffic
from ...programs.work import Operation, count_work

PARTS = {"attend": "attention", "layers": "layers", "choose": "head and sampling", "embed": "embedding"}
"""Scopes of the programs, the innermost first, with what the report calls them; `OTHERS` is the rest."""

OTHERS = "between"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the busiest device does in one tick: for one token of each sequence of a group, or for one chunk.

    moved_bytes: by part of the model; kernels, collectives: how many start; time_s: at peak rates, None if unknown.
    """

    moved_bytes: Mapping[str, float]
    kernels: int
    collectives: int
    traffic: tuple[Traffic, ...]
    time_s: float | None

    @property
    def total_bytes(self) -> float:
        """Bytes of all parts."""
        return sum(self.moved_bytes.values())


@dataclass(frozen=True, kw_only=True)
class ProgramReader:
    """Counts the work of programs on a mesh."""

    mesh: Mesh
    hardware: Hardware | None
    devices_per_node: int

    def read(self, compiled: Any, *, blocks: int) -> tuple[Costs, int]:
        """Return the costs of one tick on the device that moves most bytes, and that device's number."""
        program, count = HloModule.parse(hlo_text(compiled)), self.mesh.devices.size
        # In `choose` the heaviest branches are for top-k, top-p and log probabilities.
        assumed = Assumed(iterations={"attend": blocks}, lightest=("choose",))
        counts = count_executions(program, num_devices=count, assumed=assumed)
        work = count_work(program, counts, num_devices=count)
        collectives = list_collectives(program, counts, mesh=self.mesh)
        moved: dict[str, np.ndarray] = {part: np.zeros(count) for part in (*PARTS.values(), OTHERS)}
        for one in work.operations:
            if one.kind != "communication":
                moved[part_of(one)] = moved[part_of(one)] + one.moved_bytes * one.count
        busiest = int(np.argmax(sum(moved.values())))
        costs = Costs(
            moved_bytes={part: float(number[busiest]) for part, number in moved.items()},
            kernels=int(sum(one.count[busiest] for one in work.operations if one.is_kernel)),
            collectives=int(sum(one.count[busiest] for one in collectives)),
            traffic=sum_traffic(collectives),
            time_s=self._time_s(work.operations, collectives),
        )
        return costs, busiest

    def _time_s(self, operations: tuple[Operation, ...], collectives: tuple[Collective, ...]) -> float | None:
        if self.hardware is None:
            return None
        machine: Any = {"hardware": self.hardware, "mesh": self.mesh, "devices_per_node": self.devices_per_node}
        return sum(roofline_times_s(operations, collectives, **machine).values())


def part_of(operation: Operation) -> str:
    """Return the part of the model to which an operation belongs."""
    scopes = scopes_of(operation.op_name)
    return next((name for scope, name in PARTS.items() if scope in scopes), OTHERS)
