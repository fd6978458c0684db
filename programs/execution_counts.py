"""Count how often each device executes each computation in one run of a program.

Loops multiply the counts of their bodies, and branches are followed for each device:

    while, 8 iterations                  body             [8, 8, 8, 8]      on 4 devices
      conditional on partition-id == 0   true branch      [8, 0, 0, 0]
                                         false branch     [0, 8, 8, 8]

Where loop bounds and conditions depend only on constants, counters and the device's number, the count is exact (see
`static_values.py`). Where a branch depends on data, the most expensive one is counted every time, an upper bound; a
loop whose number of iterations depends on data is counted as one iteration, or as none in the scope `rarely`. `notes`
names both, and `Assumed` says otherwise for scopes by name. Read `collectives.py` and `work.py` next, which count
instructions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..meshes.scopes import RARELY
from .hlo import Computation, HloModule, Instruction
from .static_values import Scope, chosen_branch, entry_scope

MAX_ITERATIONS = 100_000
"""Largest number of iterations of a loop that are followed one by one.

A loop that runs longer is counted by its first iteration, so branches that change later are missed.
"""


@dataclass(frozen=True, kw_only=True)
class ExecutionCounts:
    """Number of executions of every computation on each device, [devices], and notes on inexact counts.

    The computation of a fusion counts as often as the fusion. The computations of reductions (`to_apply`) do not count.
    """

    counts: Mapping[str, np.ndarray]
    notes: tuple[str, ...]

    def of(self, computation: Computation) -> np.ndarray:
        """Return the executions of a computation on each device, zeros if no device executes it."""
        return self.counts.get(computation.name, np.zeros(1, np.int64))


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What loops and branches that depend on data do, by the name of a scope around them (`jax.named_scope`).

    iterations: of the loops in a scope.
    lightest: scopes in which the branch that produces least is taken, not the heaviest.

    Both count without a note.
    """

    iterations: Mapping[str, int] = field(default_factory=dict)
    lightest: tuple[str, ...] = ()

    def count(self, loop: Instruction) -> int | None:
        """Return the iterations of a loop that depend on data, None if nothing is said of it."""
        return next((number for name, number in self.iterations.items() if name in scopes_of(loop.op_name)), None)

    def is_light(self, conditional: Instruction) -> bool:
        """Return whether the lightest branch of a conditional is taken."""
        return not scopes_of(conditional.op_name).isdisjoint(self.lightest)


def scopes_of(op_name: str) -> set[str]:
    """Return the names of the scopes of an instruction."""
    return set(op_name.split("/"))


def count_executions(program: HloModule, *, num_devices: int, assumed: Assumed | None = None) -> ExecutionCounts:
    """Count the executions of each computation on `num_devices` devices in one run of the program."""
    walk = _Walk(program, assumed or Assumed())
    scope = entry_scope(program, num_devices=num_devices)
    walk.enter(scope, np.ones(num_devices, np.int64))
    return ExecutionCounts(counts=walk.counts, notes=tuple(dict.fromkeys(walk.notes)))


class _Walk:
    """A walk along the control flow from the entry, which adds up counts."""

    def __init__(self, program: HloModule, assumed: Assumed) -> None:
        self.flow, self.assumed = ControlFlow(program), assumed
        self.counts: dict[str, np.ndarray] = {}
        self.notes: list[str] = []

    def enter(self, scope: Scope, times: np.ndarray) -> None:
        """Add `times`, [devices], to the counts of a computation and of all that it calls."""
        name = scope.computation.name
        self.counts[name] = self.counts.get(name, 0) + times
        for instruction in self.flow.calls_of(name):
            if instruction.opcode == "while":
                self._enter_loop(scope, instruction, times)
            elif instruction.opcode == "conditional":
                self._enter_branches(scope, instruction, times)
            else:
                for called in called_once(instruction):
                    self.enter(scope.called_by(instruction, called), times)

    def _enter_loop(self, scope: Scope, instruction: Instruction, times: np.ndarray) -> None:
        """Count a loop: the first iteration times their number, or one by one if iterations can differ."""
        loop, trips = scope.loop(instruction), instruction.known_trip_count
        if trips is None:
            self._enter_loop_by_condition(scope, instruction, times)
        elif trips and (not self.flow.is_branching(instruction.called()["body"][0]) or trips > MAX_ITERATIONS):
            # All iterations count the same, so one is walked for all. With branches each is walked, as they may differ.
            self.enter(loop.body(0), times * trips)
        else:
            for iteration in range(trips):
                self.enter(loop.body(iteration), times)

    def _enter_loop_by_condition(self, scope: Scope, instruction: Instruction, times: np.ndarray) -> None:
        """Follow a loop whose number of iterations the compiler does not know, by evaluating its condition."""
        loop = scope.loop(instruction)
        running = times
        for iteration in range(MAX_ITERATIONS):
            continues = loop.continues(iteration)
            if not isinstance(continues, np.ndarray):
                count = self.assumed.count(instruction)
                if count is None:
                    count = 0 if is_rare(instruction) else 1
                    self.notes.append(f"{_place(instruction)}: iterations depend on data; counted as {count}.")
                if count:
                    self.enter(loop.body(0), times * count)
                return
            # Devices may leave the loop at different iterations; one that has left stays at 0.
            running = np.where(continues.reshape(-1), running, 0)
            if not running.any():
                return
            self.enter(loop.body(iteration), running)
        self.notes.append(f"{instruction.name}: the loop did not end within {MAX_ITERATIONS:,} iterations.")

    def _enter_branches(self, scope: Scope, instruction: Instruction, times: np.ndarray) -> None:
        """Count each branch on the devices that take it; the heaviest on all if the choice depends on data."""
        chosen = chosen_branch(instruction, scope.operand(instruction, 0))
        if chosen is None and self.assumed.is_light(instruction):
            chosen = np.array([self.flow.lightest_branch(instruction)])
        elif chosen is None:
            self.notes.append(f"{_place(instruction)}: the branch depends on data; the heaviest is counted every time.")
            chosen = np.array([self.flow.heaviest_branch(instruction)])
        for branch in np.unique(chosen):
            # `chosen` is [devices], or [1] if all take the same branch.
            share = np.where(chosen == branch, times, 0)
            if share.any():
                self.enter(scope.branch(instruction, int(branch)), share)


def is_rare(loop: Instruction) -> bool:
    """Return whether a loop is in the scope of those that nearly always have no iteration."""
    # A transformation may stand around the name of a scope: jvp(rarely).
    return re.search(rf"[/(]{RARELY}[)/]", loop.op_name) is not None


def _place(instruction: Instruction) -> str:
    return instruction.op_name or instruction.name


class ControlFlow:
    """Which instructions of a computation run others, and whether that can differ from one execution to the next.

    A loop that is followed one by one asks in every iteration, so answers are kept by name of the computation.
    """

    def __init__(self, program: HloModule) -> None:
        self._program = program
        self._callers: dict[str, tuple[Instruction, ...]] = {}
        self._branching: dict[str, bool] = {}
        self._weights: dict[str, int] = {}

    def heaviest_branch(self, instruction: Instruction) -> int:
        """Return the number of the branch of a conditional that produces most bytes."""
        return max(range(len(instruction.branches)), key=lambda branch: self._weigh(instruction.branches[branch]))

    def lightest_branch(self, instruction: Instruction) -> int:
        """Return the number of the branch of a conditional that produces fewest bytes."""
        return min(range(len(instruction.branches)), key=lambda branch: self._weigh(instruction.branches[branch]))

    def calls_of(self, name: str) -> tuple[Instruction, ...]:
        """Return the instructions of a computation that run other computations."""
        if name not in self._callers:
            own = self._program.computations[name].instructions.values()
            self._callers[name] = tuple(i for i in own if i.opcode in ("while", "conditional") or called_once(i))
        return self._callers[name]

    def is_branching(self, name: str) -> bool:
        """Return whether two executions of this computation can differ."""
        if name not in self._branching:
            # A loop of known length runs the same number of times in every execution; only its body can make it differ.
            self._branching[name] = any(
                i.opcode == "conditional"
                or (i.opcode == "while" and i.known_trip_count is None and not is_rare(i))
                or any(map(self.is_branching, called_once(i) or i.called().get("body", ())))
                for i in self.calls_of(name)
            )
        return self._branching[name]

    def _weigh(self, name: str) -> int:
        """Return the bytes that a computation produces, loops multiplied, by which branches are compared."""
        if name not in self._weights:
            own = self._program.computations[name].instructions.values()
            self._weights[name] = sum(i.num_bytes for i in own if i.opcode not in _FREE) + sum(
                self._weigh(called) * (i.known_trip_count or 1)
                for i in self.calls_of(name)
                for called in (*called_once(i), *i.branches, *i.called().get("body", ()))
            )
        return self._weights[name]


# Instructions that produce no bytes of their own.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")


def called_once(instruction: Instruction) -> tuple[str, ...]:
    """Return computations that run once per execution of an instruction; the end of an asynchronous pair has none."""
    if instruction.opcode.endswith(("-done", "-update")):
        return ()
    called = instruction.called()
    if instruction.opcode == "call":
        return called.get("to_apply", ()) + called.get("called_computations", ())
    return called.get("calls", ())
