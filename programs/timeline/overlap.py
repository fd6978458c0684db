"""Find what the compiler schedules between the start and the end of every collective of a program.

XLA:GPU writes a collective that runs beside other work in two halves, and one that nothing runs beside as one line:

    %s = (bf16[2,8], bf16[8,8]) all-gather-start(%x)       a start ...
    %y = f32[8,8] fusion(%a, %b), calls=%dot               ... encloses this product ...
    %g = bf16[8,8] all-gather-done(%s)                     ... until its end
    %r = bf16[2,8] reduce-scatter(%g)                      synchronous: encloses nothing

The halves may also be `fusion-start` or `async-start`, whose computation holds the collective. Read `simulate.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..collectives import KINDS
from ..hlo import Computation, HloModule, Instruction
from ..matmul import matrix_flops

_WRAPPERS = ("fusion", "fusion-start", "async-start")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A collective from its start to its end, None if it is synchronous.

    `collective` is the instruction that communicates: the start itself, or the one that the start wraps. `products` are
    the names of instructions between both that are a matrix product, or a loop or branch that holds one.
    """

    start: Instruction
    end: Instruction | None
    collective: Instruction
    products: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What the collective does: `all-gather`, say."""
        return self.collective.opcode.removesuffix("-start")


def list_spans(program: HloModule) -> Iterator[tuple[Computation, Span]]:
    """Yield every collective with the computation in which it starts and ends."""
    finder = _Products(program)
    wrapped = {name for _, i in program.instructions() if i.opcode in _WRAPPERS for name in i.called().get("calls", ())}
    for computation in program.computations.values():
        if computation.name in wrapped:
            continue
        order = list(computation.instructions.values())
        places = {instruction.name: place for place, instruction in enumerate(order)}
        ends = {_start_of(end, computation): end for end in order if end.opcode.endswith("-done")}
        for start in order:
            collective = communication_of(program, start)
            if collective is None:
                continue
            end = ends.get(start.name)
            between = [] if end is None else order[places[start.name] + 1 : places[end.name]]
            products = tuple(one.name for one in between if finder.is_one(one, computation))
            yield computation, Span(start=start, end=end, collective=collective, products=products)


def communication_of(program: HloModule, instruction: Instruction) -> Instruction | None:
    """Return the collective that an instruction runs or starts: itself, or one that it wraps; None for all others."""
    if instruction.opcode.removesuffix("-start") in KINDS:
        return instruction
    if instruction.opcode not in _WRAPPERS:
        return None
    inside = [program.computations[name].instructions for name in instruction.called().get("calls", ())]
    return next((one for own in inside for one in own.values() if one.opcode in KINDS), None)


def _start_of(end: Instruction, computation: Computation) -> str:
    """Return the name of the start that belongs to an end, through updates between them."""
    name = end.operands[0]
    while name in computation.instructions and computation.instructions[name].opcode.endswith("-update"):
        name = computation.instructions[name].operands[0]
    return name


class _Products:
    """Tells which instructions are matrix products or hold one; computations are searched once."""

    def __init__(self, program: HloModule) -> None:
        self._program = program
        self._known: dict[str, bool] = {}

    def is_one(self, instruction: Instruction, computation: Computation) -> bool:
        """Return whether an instruction is a product, or a fusion, call, loop or branch that holds one."""
        if matrix_flops(instruction, computation):
            return True
        called = instruction.called()
        names = [*called.get("calls", ()), *called.get("body", ()), *instruction.branches]
        if instruction.opcode == "call":
            names += called.get("to_apply", ())
        return any(map(self._is_in, names))

    def _is_in(self, name: str) -> bool:
        if name not in self._known:
            computation = self._program.computations[name]
            self._known[name] = any(self.is_one(i, computation) for i in computation.instructions.values())
        return self._known[name]
