"""Evaluate the small values of a program that are known before it runs: loop counters, table entries, conditions.

The branch that a device takes often depends only on constants, a loop counter and the device's own number; the tables
of our pipeline executor are of this kind. This file evaluates such values lazily, so that `execution_counts.py` can
follow the control flow exactly. Example, for a rank that idles in every second tick:

    %tick = s32[] get-tuple-element(%carry), index=0      0, 1, 2, ...          from the loop
    %rank = u32[] partition-id()                          [0, 1, 2, 3]          one value per device
    %kind = s32[1,1] dynamic-slice(%table, %rank, %tick)  [1, 0, 1, 0]          from a constant
    %made = f32[4] conditional(%kind, ...)                None                  depends on data

A value is a numpy array [devices, ...], with a first dimension of 1 if all devices have the same value. Values that
depend on data are None, and so are large arrays. The elements of a tuple are evaluated one by one, when needed.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .hlo import Array, Computation, HloModule, Instruction
from .static_operations import DTYPES, compute

MAX_ELEMENTS = 1_000_000
"""Arrays with more elements are treated as data."""


class TupleValue(Protocol):
    """A tuple whose elements are evaluated when needed."""

    def element(self, index: int) -> "Value":
        """Return one element."""
        ...


Value = np.ndarray | TupleValue | None
"""An array [devices or 1, ...], a tuple, or None where it is not known before the program runs."""


class Scope:
    """One call of a computation: evaluate its instructions, given the values of its parameters."""

    def __init__(
        self, program: HloModule, computation: Computation, arguments: Callable[[int], Value], *, num_devices: int
    ) -> None:
        self.program, self.computation, self.num_devices = program, computation, num_devices
        self._arguments = arguments
        self._known: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """Return the value of an instruction."""
        if name not in self._known:
            self._known[name] = self._compute(self.computation.instructions[name])
        return self._known[name]

    def operand(self, instruction: Instruction, index: int) -> Value:
        """Return the value of one of an instruction's operands."""
        return self.value(instruction.operands[index])

    def call(self, name: str, arguments: Callable[[int], Value]) -> "Scope":
        """Return the scope of a computation called from here."""
        return Scope(self.program, self.program.computations[name], arguments, num_devices=self.num_devices)

    def called_by(self, instruction: Instruction, name: str) -> "Scope":
        """Return the scope of a computation whose parameters are the instruction's operands."""
        return self.call(name, lambda number: self.operand(instruction, number))

    def loop(self, instruction: Instruction) -> "Loop":
        """Return the iterations of a while instruction."""
        return Loop(self, instruction)

    def element_of(self, name: str, index: int) -> Value:
        """Return one element of a tuple without evaluating the others."""
        value = self.value(name)
        return None if value is None or isinstance(value, np.ndarray) else value.element(index)

    def _compute(self, instruction: Instruction) -> Value:
        """Evaluate an instruction, and the operands that it needs."""
        opcode, type_ = instruction.opcode, instruction.type
        if isinstance(type_, Array) and (type_.num_elements > MAX_ELEMENTS or type_.dtype not in DTYPES):
            return None
        # Opcodes that are evaluated without all of their operands; any other one needs the values of all of them.
        special: Callable[[Instruction], Value] | None = {
            "parameter": self._compute_parameter,
            "get-tuple-element": self._compute_element,
            "partition-id": lambda _: np.arange(self.num_devices, dtype=np.uint32),
            # jax compiles one replica in many partitions.
            "replica-id": lambda _: np.zeros(1, np.uint32),
            "copy": lambda copy: self.operand(copy, 0),
            "optimization-barrier": lambda barrier: self.operand(barrier, 0),
            "tuple": lambda made: _LazyTuple(lambda index: self.operand(made, index)),
            "while": self._finish_loop,
            "conditional": self._choose,
            "clamp": self._clamp,
            "fusion": self._call_whole,
            "call": self._call_whole,
        }.get(opcode)
        if special is not None:
            return special(instruction)
        if not isinstance(type_, Array):
            return None
        # The payload of a constant is its value, not a list of operands.
        values = [] if opcode in ("constant", "iota") else [self.value(name) for name in instruction.operands]
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        return compute(instruction, type_, *arrays) if len(arrays) == len(values) else None

    def _compute_parameter(self, parameter: Instruction) -> Value:
        return self._arguments(int(parameter.payload))

    def _compute_element(self, element: Instruction) -> Value:
        return self.element_of(element.operands[0], element.numbers("index")[0])

    def _clamp(self, clamp: Instruction) -> Value:
        """Evaluate a clamp, whose operands are low, x and high; between equal numbers x need not be known."""
        low, high = self.operand(clamp, 0), self.operand(clamp, 2)
        if not isinstance(low, np.ndarray) or not isinstance(high, np.ndarray):
            return None
        # Scalars: `layers/in_order.py` writes clamp(1, x, 1) for XLA, which does not see through it.
        if low.ndim == 1 and np.array_equal(low, high):
            return low
        x = self.operand(clamp, 1)
        if not isinstance(x, np.ndarray) or not isinstance(clamp.type, Array):
            return None
        return compute(clamp, clamp.type, low, x, high)

    def _finish_loop(self, instruction: Instruction) -> Value:
        loop, trips = self.loop(instruction), instruction.known_trip_count
        # Element by element: those that depend on data are unknown, the counter beside them is not.
        return None if trips is None or trips > MAX_ELEMENTS else _LazyTuple(lambda index: loop.element(trips, index))

    def _call_whole(self, instruction: Instruction) -> Value:
        called = self.called_by(instruction, next(iter(instruction.called().values()))[0])
        return called.value(called.computation.root.name)

    def _choose(self, instruction: Instruction) -> Value:
        """Evaluate a conditional: the branches that some device takes, merged."""
        chosen = chosen_branch(instruction, self.operand(instruction, 0))
        if chosen is None:
            return None
        taken = [int(branch) for branch in np.unique(chosen)]
        scopes = {branch: self.branch(instruction, branch) for branch in taken}

        def merge(values: dict[int, Value]) -> Value:
            """Take the value of each device from the branch that it takes."""
            if len(taken) == 1:
                return values[taken[0]]
            result = values[taken[0]]
            for branch in taken[1:]:
                other = values[branch]
                if not isinstance(result, np.ndarray) or not isinstance(other, np.ndarray):
                    return None
                result = np.where((chosen == branch).reshape(-1, *[1] * (other.ndim - 1)), other, result)
            return result

        roots = {branch: scope.computation.root.name for branch, scope in scopes.items()}
        if isinstance(instruction.type, Array):
            return merge({branch: scope.value(roots[branch]) for branch, scope in scopes.items()})
        return _LazyTuple(
            lambda i: merge({branch: scope.element_of(roots[branch], i) for branch, scope in scopes.items()})
        )

    def branch(self, instruction: Instruction, number: int) -> "Scope":
        """Return the scope of one branch of a conditional."""
        # Operand 0 is the predicate; each branch has one argument, in the order of the branches.
        return self.call(instruction.branches[number], lambda _: self.operand(instruction, number + 1))


class Loop:
    """A while loop: the scopes of its body and condition in each iteration."""

    def __init__(self, outside: Scope, instruction: Instruction) -> None:
        called = instruction.called()
        self._outside, self._instruction = outside, instruction
        self._body, self._condition = called["body"][0], called["condition"][0]
        self._root = outside.program.computations[self._body].root
        self._scopes: list[Scope] = []
        self._carried: dict[int, list[Value]] = {}

    def body(self, iteration: int) -> Scope:
        """Return the scope of the body in an iteration, counted from 0."""
        while len(self._scopes) <= iteration:
            self._scopes.append(self._enter(self._body, len(self._scopes)))
        return self._scopes[iteration]

    def continues(self, iteration: int) -> Value:
        """Return whether the loop runs its body in this iteration."""
        scope = self._enter(self._condition, iteration)
        return scope.value(scope.computation.root.name)

    def element(self, iteration: int, index: int) -> Value:
        """Return an element of the carried tuple before an iteration."""
        carried = self._carried.setdefault(index, [])
        if not carried:
            carried.append(self._outside.element_of(self._instruction.operands[0], index))
        # The common case: a table that the loop only reads is evaluated once, not in every iteration.
        if is_invariant(self.body(0).computation, index):
            return carried[0]
        # Forwards from the start, since recursion from the end would nest as deep as the loop is long.
        while len(carried) <= iteration:
            carried.append(self.body(len(carried) - 1).element_of(self._root.name, index))
        return carried[iteration]

    def _enter(self, name: str, iteration: int) -> Scope:
        return self._outside.call(name, lambda _: _LazyTuple(lambda index: self.element(iteration, index)))


class _LazyTuple:
    """A tuple that evaluates an element when it is asked for."""

    def __init__(self, part: Callable[[int], Value]) -> None:
        self._part = part

    def element(self, index: int) -> Value:
        return self._part(index)


def is_invariant(body: Computation, index: int) -> bool:
    """Return whether a loop's body returns an element of its tuple unchanged."""
    if body.root.opcode != "tuple":
        return False
    made = body.instructions[body.root.operands[index]]
    while made.opcode == "copy":
        made = body.instructions[made.operands[0]]
    if made.opcode != "get-tuple-element" or made.numbers("index") != (index,):
        return False
    return body.instructions[made.operands[0]].opcode == "parameter"


def chosen_branch(conditional: Instruction, predicate: Value) -> np.ndarray | None:
    """Return the number of the branch that each device takes, [devices or 1], or None if the predicate is unknown."""
    if not isinstance(predicate, np.ndarray):
        return None
    if predicate.dtype == bool:
        return np.where(predicate.reshape(-1), 0, 1)
    last = len(conditional.branches) - 1
    index = predicate.reshape(-1).astype(np.int64)
    # XLA runs the last branch for every index that is out of range.
    return np.where((index < 0) | (index > last), last, index)


def entry_scope(program: HloModule, *, num_devices: int) -> Scope:
    """Return the scope of the whole program; its inputs are unknown."""
    return Scope(program, program.entry, lambda _: None, num_devices=num_devices)
