"""Where the compiler puts what a loop carries from one iteration to the next: in-flight activations and gradients.

XLA hands out its buffer assignment: for every value an allocation, an offset and a size. Values that share memory are
counted once, since the sums are over places. Read `memory.py` next.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .evaluate import is_invariant
from .hlo import Array, Program
from .wire import messages_of, number_of, numbers_of, read_fields, text_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """A range of bytes in one of the program's allocations."""

    allocation: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class CarriedBuffer:
    """An array that a loop changes and hands on, in temporary memory; `op_name` is the loop's.

    `depth` is "outer" for a loop that is in no other.
    """

    loop: str
    depth: Literal["outer", "inner"]
    op_name: str
    array: Array
    place: Place


Places = Mapping[tuple[str, tuple[int, ...]], Place]
"""Where a value lives, by the instruction that makes it and the index in its tuple."""


def read_places(buffer_assignment: bytes, module: bytes) -> Places:
    """Return the places of all values in temporary memory, from XLA's BufferAssignmentProto and HloModuleProto.

    Field numbers are those of xla/service/hlo.proto. Inputs, outputs, constants and the scratch of single instructions
    are no temporary memory.
    """
    names = {
        number_of(instruction, 35): text_of(instruction, 1)
        for computation in messages_of(read_fields(module), 3)
        for instruction in messages_of(computation, 2)
    }
    assignment = read_fields(buffer_assignment)
    values: dict[int, tuple[str, tuple[int, ...]]] = {}
    for value in messages_of(assignment, 1):
        (location,) = messages_of(value, 3)
        values[number_of(value, 1)] = names.get(number_of(location, 4), ""), numbers_of(location, 3)
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    for allocation in messages_of(assignment, 3):
        if any(number_of(allocation, flag) for flag in (3, 5, 7, 12)):
            continue
        for assigned in messages_of(allocation, 9):
            start = number_of(assigned, 2)
            place = Place(allocation=number_of(allocation, 1), start=start, end=start + number_of(assigned, 3))
            places[values[number_of(assigned, 1)]] = place
    return places


def list_carried(program: Program, places: Places) -> Iterator[CarriedBuffer]:
    """Yield what the loops of a program carry in temporary memory and change."""
    inner = _inside_loops(program)
    for computation, loop in program.instructions():
        if loop.opcode != "while" or isinstance(loop.type, Array):
            continue
        body = program.computations[loop.called()["body"][0]]
        for index, element in enumerate(loop.type):
            place = places.get((loop.name, (index,)))
            if place is not None and isinstance(element, Array) and not is_invariant(body, index):
                yield CarriedBuffer(
                    loop=loop.name,
                    depth="inner" if computation.name in inner else "outer",
                    op_name=loop.op_name,
                    array=element,
                    place=place,
                )


def _inside_loops(program: Program) -> set[str]:
    """The computations that some loop runs."""
    called = {
        name: {one for i in computation.instructions.values() for names in i.called().values() for one in names}
        for name, computation in program.computations.items()
    }
    left = [body for _, i in program.instructions() if i.opcode == "while" for body in i.called()["body"]]
    found: set[str] = set()
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += called[name]
    return found


def measure(places: Iterable[Place]) -> int:
    """Return the bytes that places cover together, shared ones once."""
    total = 0
    allocation, reached = -1, 0
    for place in sorted(places, key=lambda place: (place.allocation, place.start)):
        if place.allocation != allocation:
            allocation, reached = place.allocation, 0
        total += max(0, place.end - max(place.start, reached))
        reached = max(reached, place.end)
    return total
