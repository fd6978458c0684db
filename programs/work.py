"""Count the work of a program: class, flops, moved bytes and executions of every instruction.

A multiply-add of a matrix product is two flops. Vector flops are one per element of an arithmetic operation on
floating-point numbers, including transcendental functions. Moved bytes are those that an instruction reads and writes
in main memory: operands and result of a fusion but not its intermediate values, and only the touched part of a buffer
that is sliced or updated in place. Read `roofline.py` next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from .collectives import KINDS
from .execution_counts import ExecutionCounts
from .hlo import Array, Computation, HloModule, Instruction, leaves
from .matmul import matrix_dtype, matrix_flops

WorkClass = Literal["matrix", "vector", "communication", "control"]
"""The unit that an instruction keeps busy; control is for loops, branches, tuples and scalars."""

Unit = Literal["matrix", "vector"]
"""The units that compute flops."""

UNITS: tuple[Unit, ...] = ("matrix", "vector")
"""In the order of tables."""

CLASSES: tuple[WorkClass, ...] = ("matrix", "vector", "communication", "control")
"""In the order of tables."""

SMALL_ELEMENTS = 64
"""Instructions without a matrix product whose arrays have at most this many elements count as control."""

_CONTROL = (
    {"while", "conditional", "call", "tuple", "get-tuple-element", "parameter", "constant", "bitcast", "iota"}
    | {"partition-id", "replica-id", "after-all", "add-dependency", "domain"}
    | {"optimization-barrier", "opt-barrier"}
)
# Opcodes that compute one flop for each element of the result.
_ARITHMETIC = (
    {"add", "subtract", "multiply", "divide", "remainder", "maximum", "minimum", "negate", "abs", "sign", "clamp"}
    | {"floor", "ceil", "round-nearest-afz", "round-nearest-even", "convert", "compare", "select"}
    | {"power", "sqrt", "rsqrt", "cbrt", "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic"}
    | {"tanh", "tan", "sine", "cosine", "atan2", "erf"}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation:
    """One instruction: its class, the costs of one execution, and its executions on each device, [devices]."""

    name: str
    op_name: str
    kind: WorkClass
    dtype: str
    matrix_flops: int
    vector_flops: int
    moved_bytes: int
    count: np.ndarray

    @property
    def is_kernel(self) -> bool:
        """Whether a device is told to compute or to copy something: loops, branches, views and collectives are none."""
        return self.kind in UNITS or (self.kind == "control" and self.moved_bytes > 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """All operations of a program; `uncounted` names library calls with unknown flops."""

    operations: tuple[Operation, ...]
    uncounted: tuple[str, ...]

    def flops(self, unit: Unit) -> np.ndarray:
        """Return the flops of a step on each device, [devices]."""
        costs = [(getattr(o, f"{unit}_flops"), o.count) for o in self.operations]
        return np.sum([cost * count for cost, count in costs if cost] or [np.zeros(1)], axis=0)

    def moved_bytes(self, kind: WorkClass) -> np.ndarray:
        """Return the bytes that operations of a class move in a step on each device, [devices]."""
        return np.sum([o.moved_bytes * o.count for o in self.operations if o.kind == kind] or [np.zeros(1)], axis=0)


def count_work(program: HloModule, executions: ExecutionCounts, *, num_devices: int) -> Work:
    """Return the work of one run of a program."""
    costs = _Costs(program)
    return Work(
        operations=tuple(_list_operations(program, executions, costs, num_devices)),
        uncounted=tuple(dict.fromkeys(costs.uncounted)),
    )


def _list_operations(
    program: HloModule, executions: ExecutionCounts, costs: "_Costs", num_devices: int
) -> Iterator[Operation]:
    """Yield the instructions that some device executes, those inside fusions excepted."""
    inside = {name for _, i in program.instructions() if i.opcode.startswith("fusion") for name in _calls(i)}
    for computation, instruction in program.instructions():
        count = np.broadcast_to(executions.of(computation), (num_devices,))
        # The start of an asynchronous pair counts for both, and a fusion for the instructions in it.
        if computation.name in inside or not count.any() or instruction.opcode.endswith(("-done", "-update")):
            continue
        kind = costs.kind(instruction, computation)
        is_moved = kind != "control" or instruction.opcode not in _CONTROL
        yield Operation(
            name=instruction.name,
            op_name=instruction.op_name,
            kind=kind,
            dtype=costs.dtype(instruction, computation),
            matrix_flops=costs.matrix(instruction, computation),
            vector_flops=costs.vector(instruction, computation),
            moved_bytes=costs.moved(instruction, computation) if is_moved else 0,
            count=count,
        )


class _Costs:
    """The costs of one execution of an instruction; sums over a fusion's code are cached."""

    def __init__(self, program: HloModule) -> None:
        self.program = program
        self.uncounted: list[str] = []
        self.inner_matrix = cache(lambda name: self._sum(name, self.matrix))
        self.inner_vector = cache(lambda name: self._sum(name, self.vector))

    def kind(self, instruction: Instruction, computation: Computation) -> WorkClass:
        """Return the unit that an instruction keeps busy."""
        opcode = instruction.opcode.removesuffix("-start")
        # XLA may wrap a collective into an asynchronous start or a fusion, which then counts as the collective.
        if opcode in KINDS or any(i.opcode in KINDS for name in _calls(instruction) for i in self._own(name)):
            return "communication"
        if opcode in _CONTROL or opcode.startswith("async"):
            return "control"
        if self.matrix(instruction, computation):
            return "matrix"
        operand_elements = [leaf.num_elements for t in computation.operand_types(instruction) for leaf in leaves(t)]
        largest = max([leaf.num_elements for leaf in leaves(instruction.type)] + operand_elements, default=0)
        return "control" if largest <= SMALL_ELEMENTS else "vector"

    def matrix(self, instruction: Instruction, computation: Computation) -> int:
        """Return the flops on matrix units; library calls with unknown flops are noted."""
        if instruction.opcode.startswith("fusion"):
            return sum(map(self.inner_matrix, _calls(instruction)))
        flops = matrix_flops(instruction, computation)
        if instruction.opcode == "custom-call" and not flops:
            self.uncounted.append(instruction.text("custom_call_target"))
        return flops

    def dtype(self, instruction: Instruction, computation: Computation) -> str:
        """Return the element type of the matrix products, or of the first operand without products."""
        for name in _calls(instruction):
            within = self.program.computations[name]
            for inner in within.instructions.values():
                if self.matrix(inner, within):
                    return self.dtype(inner, within)
        return matrix_dtype(instruction, computation)

    def vector(self, instruction: Instruction, computation: Computation) -> int:
        """Return the flops on vector units: one per element, of the operand for a reduction."""
        opcode = instruction.opcode
        if opcode.startswith("fusion"):
            return sum(map(self.inner_vector, _calls(instruction)))
        result = next(leaves(instruction.type), None)
        if result is None or not result.dtype.startswith(("f", "bf")):
            return 0
        if opcode in _ARITHMETIC:
            return result.num_elements
        if opcode == "reduce":
            return _elements(computation.operand_types(instruction)[0])
        if opcode == "scatter":
            return _elements(computation.operand_types(instruction)[-1])
        return 0

    def moved(self, instruction: Instruction, computation: Computation) -> int:
        """Return the bytes that are read from and written to main memory."""
        if instruction.opcode.startswith("fusion"):
            (name,) = _calls(instruction)
            return _moved_by_fusion(self.program.computations[name])
        return _moved_by_one(instruction, computation)

    def _sum(self, name: str, cost: Callable[[Instruction, Computation], int]) -> int:
        """Return the sum of a cost over the instructions of a computation."""
        computation = self.program.computations[name]
        return sum(cost(instruction, computation) for instruction in computation.instructions.values())

    def _own(self, name: str) -> Iterable[Instruction]:
        return self.program.computations[name].instructions.values()


def _calls(instruction: Instruction) -> tuple[str, ...]:
    return instruction.called().get("calls", ()) if "calls=" in instruction.attributes else ()


def _moved_by_one(instruction: Instruction, computation: Computation) -> int:
    """Return the bytes that an instruction outside of fusions moves."""
    opcode = instruction.opcode
    # Only the touched part moves. A slice reads and writes its result; an update in place reads and writes the update;
    # a scatter reads the updates and the elements that they are added to, and writes these.
    if opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * instruction.num_bytes
    if opcode == "dynamic-update-slice":
        return 2 * _operand_bytes(instruction, computation, 1)
    if opcode == "scatter":
        return 3 * _operand_bytes(instruction, computation, -1)
    return computation.operand_bytes(instruction) + _result_bytes(instruction)


def _moved_by_fusion(code: Computation) -> int:
    """Return the bytes that a fusion moves.

    A parameter that is only sliced is read in part; a root that updates a parameter in place writes the update only.
    """
    users: dict[str, list[Instruction]] = {}
    for instruction in code.instructions.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    read = sum(
        _read_of(instruction, users, code)
        for instruction in code.instructions.values()
        if instruction.opcode == "parameter"
    )
    roots = [code.instructions[name] for name in code.root.operands] if code.root.opcode == "tuple" else [code.root]
    return read + sum(_written_by(root, code) for root in roots)


def _read_of(parameter: Instruction, users: Mapping[str, list[Instruction]], code: Computation) -> int:
    """Return the bytes of a fusion's parameter that are read: all of it unless every user takes a part."""
    read = 0
    for user in users.get(parameter.name, []):
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == parameter.name:
            read += user.num_bytes
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == parameter.name:
            # The buffer that is updated in place is not read.
            continue
        elif user.opcode in ("bitcast", "copy", "convert", "reshape"):
            # The same bytes in another form: their own users decide how much is read.
            read += min(_read_of(user, users, code), parameter.num_bytes)
        else:
            return parameter.num_bytes
    return min(read, parameter.num_bytes)


def _written_by(root: Instruction, code: Computation) -> int:
    """Return the bytes that a result of a fusion writes: the update alone if it updates a parameter in place."""
    made = root
    while made.opcode in ("bitcast", "copy", "convert") and made.operands:
        made = code.instructions[made.operands[0]]
    if made.opcode == "scatter":
        # It also reads the elements that it changes.
        return 2 * _operand_bytes(made, code, -1)
    return _operand_bytes(made, code, 1) if made.opcode == "dynamic-update-slice" else root.num_bytes


def _operand_bytes(instruction: Instruction, computation: Computation, index: int) -> int:
    return sum(leaf.num_bytes for leaf in leaves(computation.operand_types(instruction)[index]))


def _result_bytes(instruction: Instruction) -> int:
    """Return the bytes of the result; the tuple of an asynchronous start has its operands first."""
    type_ = instruction.type
    if isinstance(type_, Array) or not instruction.opcode.endswith("-start"):
        return instruction.num_bytes
    return sum(leaf.num_bytes for leaf in leaves(type_[1]))


def _elements(type_: object) -> int:
    assert isinstance(type_, Array)
    return type_.num_elements
