"""Run the schedule of a GPU program on clocks: one for each device, which waits for the others as the program says.

Kernels of a device follow each other. A collective starts when all devices of its group have reached it and the one
before it on the same links has ended; the device goes on until it needs the end:

    kernels   | matmul | matmul |  waits  | add |         exposed: from the second matmul to the end
    links        | all-gather -----------|

Devices of a pipeline take different branches, so one waits where another still works: that is the bubble, a result
here. A loop whose iterations cannot differ is run once and multiplied. Read `exposed.py` next.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..execution_counts import MAX_ITERATIONS, ControlFlow, called_once, is_rare
from ..hlo import HloModule, Instruction
from ..static_values import Scope, chosen_branch, entry_scope
from .efficiencies import BRANCH_S, Transfer, latest
from .overlap import Span, list_spans

WAITING = "waiting"
"""What a device spends when another one is late: the bubble of a pipeline, and ranks with less work."""

LAUNCHES = "launches"
"""What is spent between kernels, and on conditionals."""

EXPOSED = "exposed over "
"""Before the axes of a collective: what is spent until its end, not counting that others are late."""

Spent = Mapping[str, np.ndarray]
"""Seconds on each device, [devices], by what they are spent on: `matrix`, `vector`, `control` and the above."""


def simulate(
    program: HloModule,
    *,
    kernels_s: Mapping[str, Mapping[str, float]],
    transfers: Mapping[str, Transfer],
    num_devices: int,
) -> Spent:
    """Return what each device spends the time of one run on; the sums over all of it are equal on all devices.

    Args:
        kernels_s: seconds of one run of an instruction, by its name and by what they are spent on.
        transfers: runs of collectives, by name of their instruction.
    """
    walk = _Walk(program, kernels_s, transfers, num_devices)
    clock, everyone = _Clock(num_devices), np.ones(num_devices, bool)
    scope = entry_scope(program, num_devices=num_devices)
    walk.run(scope.computation.name, scope, clock, everyone)
    # The step ends on all devices together.
    clock.advance(WAITING, clock.now.max() - clock.now, everyone)
    return clock.spent


class _Clock:
    """The time on each device, [devices], what it was spent on, and what is under way."""

    def __init__(self, num_devices: int) -> None:
        self.now = np.zeros(num_devices)
        self.spent: dict[str, np.ndarray] = {}
        # Until when the links inside nodes (False) and between nodes (True) are taken.
        self.taken = {False: np.zeros(num_devices), True: np.zeros(num_devices)}
        # Start of a collective -> when it ends, and when it would have ended if no device had been late.
        self.pending: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def advance(self, name: str, seconds: np.ndarray | float, active: np.ndarray) -> None:
        """Let the active devices spend some seconds."""
        passed = np.where(active, seconds, 0.0)
        self.now = self.now + passed
        self.spent[name] = self.spent.get(name, 0.0) + passed


@dataclass(frozen=True, kw_only=True)
class _Kernels:
    """Kernels that follow each other, and their seconds by what they are spent on."""

    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _End:
    """The end of a collective."""

    span: Span


_Step = _Kernels | Span | _End | Instruction
"""Kernels, the start of a collective, its end, or an instruction that runs other computations."""


class _Walk:
    """A walk along the schedule, which moves clocks."""

    def __init__(
        self,
        program: HloModule,
        kernels_s: Mapping[str, Mapping[str, float]],
        transfers: Mapping[str, Transfer],
        num_devices: int,
    ) -> None:
        self._program, self._kernels_s, self._transfers = program, kernels_s, transfers
        self._num_devices = num_devices
        self._flow = ControlFlow(program)
        self._spans: dict[str, Span | _End] = {}
        for _, span in list_spans(program):
            self._spans[span.start.name] = span
            if span.end is not None:
                self._spans[span.end.name] = _End(span=span)
        self._steps: dict[str, list[_Step]] = {}
        self._single: dict[str, tuple[_Clock, list[Transfer]]] = {}

    def run(self, name: str, scope: Scope | None, clock: _Clock, active: np.ndarray) -> None:
        """Run a computation on the active devices; only one that branches needs a scope."""
        for step in self._steps_of(name):
            match step:
                case _Kernels():
                    for what, seconds in step.seconds.items():
                        clock.advance(what, seconds, active)
                case Span():
                    self._start(step, clock, active)
                case _End():
                    self._end(step.span, clock, active)
                case Instruction(opcode="while"):
                    self._loop(step, scope, clock, active)
                case Instruction(opcode="conditional"):
                    self._branch(step, scope, clock, active)
                case Instruction():
                    for called in called_once(step):
                        self._enter(called, scope and scope.called_by(step, called), clock, active)

    def _steps_of(self, name: str) -> list[_Step]:
        """Return the steps of a computation: kernels in a row are one step."""
        if name not in self._steps:
            found: list[_Step] = []
            callers = {instruction.name for instruction in self._flow.calls_of(name)}
            for instruction in self._program.computations[name].instructions.values():
                if instruction.name in self._spans:
                    found.append(self._spans[instruction.name])
                elif instruction.name in self._kernels_s:
                    if not found or not isinstance(found[-1], _Kernels):
                        found.append(_Kernels(seconds={}))
                    last = found[-1]
                    assert isinstance(last, _Kernels)
                    for what, seconds in self._kernels_s[instruction.name].items():
                        last.seconds[what] = last.seconds.get(what, 0.0) + seconds
                elif instruction.name in callers and not instruction.opcode.startswith("fusion"):
                    found.append(instruction)
            self._steps[name] = found
        return self._steps[name]

    def _start(self, span: Span, clock: _Clock, active: np.ndarray) -> None:
        """Start a collective; a synchronous one ends at once."""
        transfer = self._transfers.get(span.collective.name)
        if transfer is None:
            return
        taken = clock.taken[transfer.crosses_nodes]
        ready = np.where(active, np.maximum(clock.now, taken), -np.inf)
        begins = latest(ready, transfer.groups, is_permute=transfer.is_permute)
        ends = begins + transfer.seconds
        clock.taken[transfer.crosses_nodes] = np.where(active, ends, taken)
        clock.pending[span.start.name] = (ends, ready + transfer.seconds)
        if span.end is None:
            self._end(span, clock, active)

    def _end(self, span: Span, clock: _Clock, active: np.ndarray) -> None:
        """Wait for the end of a collective: until it would have ended at best, and for those that were late."""
        if span.start.name not in clock.pending:
            return
        ends, at_best = clock.pending.pop(span.start.name)
        axis = self._transfers[span.collective.name].axis
        clock.advance(EXPOSED + axis, np.maximum(at_best - clock.now, 0.0), active)
        clock.advance(WAITING, np.maximum(ends - clock.now, 0.0), active)

    def _loop(self, instruction: Instruction, scope: Scope | None, clock: _Clock, active: np.ndarray) -> None:
        """Run a loop: one iteration times their number, or one by one if they can differ."""
        if is_rare(instruction):
            return
        trips, body = instruction.known_trip_count, instruction.called()["body"][0]
        if trips is not None and not self._flow.is_branching(body):
            self._enter(body, None, clock, active, times=trips)
            return
        assert scope is not None
        loop, iteration = scope.loop(instruction), 0
        while active.any() and iteration < (MAX_ITERATIONS if trips is None else trips):
            if trips is None:
                continues = loop.continues(iteration)
                # Where it depends on data, one iteration is run, as `count_executions` counts and notes.
                is_known = isinstance(continues, np.ndarray)
                active = active & (continues.reshape(-1) if is_known else iteration == 0)
            if active.any():
                self._enter(body, loop.body(iteration), clock, active)
            iteration += 1

    def _branch(self, instruction: Instruction, scope: Scope | None, clock: _Clock, active: np.ndarray) -> None:
        """Run each branch on the devices that take it; the heaviest on all if the choice depends on data."""
        assert scope is not None
        clock.advance(LAUNCHES, BRANCH_S, active)
        chosen = chosen_branch(instruction, scope.operand(instruction, 0))
        if chosen is None:
            chosen = np.array([self._flow.heaviest_branch(instruction)])
        for branch in np.unique(chosen):
            taking = active & (chosen == branch)
            if taking.any():
                name = instruction.branches[int(branch)]
                self._enter(name, scope.branch(instruction, int(branch)), clock, taking)

    def _enter(self, name: str, scope: Scope | None, clock: _Clock, active: np.ndarray, *, times: int = 1) -> None:
        """Run a computation, or add what one run takes if all runs are the same."""
        if self._flow.is_branching(name):
            self.run(name, scope, clock, active)
            return
        single, used = self._run_alone(name)
        # Those that communicate in it are together before the first run, and stay so.
        for transfer in used if times else ():
            ready = np.where(active, clock.now, -np.inf)
            together = latest(ready, transfer.groups, is_permute=transfer.is_permute)
            clock.advance(WAITING, np.maximum(together - clock.now, 0.0), active)
        for what, seconds in single.spent.items():
            clock.advance(what, times * seconds, active)

    def _run_alone(self, name: str) -> tuple[_Clock, list[Transfer]]:
        """Return the clock after one run of a computation from 0, and the collectives in it with different groups."""
        if name not in self._single:
            clock = _Clock(self._num_devices)
            self.run(name, None, clock, np.ones(self._num_devices, bool))
            self._single[name] = clock, list(self._transfers_in(name).values())
        return self._single[name]

    def _transfers_in(self, name: str) -> dict[tuple[str, bool], Transfer]:
        """Return a collective for each kind of groups in a computation, those that it calls included."""
        found: dict[tuple[str, bool], Transfer] = {}
        for step in self._steps_of(name):
            if isinstance(step, Span) and step.collective.name in self._transfers:
                transfer = self._transfers[step.collective.name]
                found[transfer.axis, transfer.is_permute] = transfer
            elif isinstance(step, Instruction):
                for called in (*called_once(step), *step.called().get("body", ())):
                    found |= self._transfers_in(called)
        return found
