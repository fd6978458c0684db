"""Find collectives of a compiled CPU program that may run at once though their devices cannot tell them apart.

XLA for CPUs runs a loop or a conditional on several threads, and holds the next collective back only until it has
started. Devices meet by run, kind of collective and group alone, since jax gives all collectives the channel 1:

    loop   reduce-scatter, reduce-scatter, ...      device 0 is here
    reduce-scatter of the same group                device 1 is here already: both take part in "the" reduce-scatter

So what comes after a loop or a conditional has to wait for its data: for memory that it writes. A value that merely
passes through its tuple does not wait for it.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trellax.programs.collectives import KINDS
from trellax.programs.groups import read_groups
from trellax.programs.hlo import Computation, HloModule, Instruction, Type

Met = tuple[str, Hashable]
"""Kind of a collective and one of its groups of devices."""


class Value(NamedTuple):
    """An array: the memory that it is in, and the communicating instructions that have ended once it is there."""

    memory: Hashable
    after: frozenset[str]


Tree = Any
"""A value, or a tuple of trees, as the type of an instruction."""


class Unordered(NamedTuple):
    """A loop or conditional, and a later instruction that may wait for the same devices at the same time."""

    first: str
    second: str
    kinds: frozenset[str]


@dataclass
class Walked:
    """What a computation is to its caller: the memory that it reads, its result, and whom it meets in what."""

    read: set[Hashable] = field(default_factory=set)
    result: Tree = None
    met: set[Met] = field(default_factory=set)


def find_unordered(program: HloModule, *, num_devices: int = 8) -> list[Unordered]:
    """Return all such pairs of a program; there should be none."""
    found: list[Unordered] = []
    walked: dict[str, Walked] = {}

    def walk(name: str) -> Walked:
        if name not in walked:
            walked[name] = _Sequence(program.computations[name], walk, found, num_devices).run()
        return walked[name]

    walk(program.entry.name)
    return found


class _Sequence:
    """The instructions of one computation, in the order in which they are scheduled."""

    def __init__(self, computation: Computation, walk: Any, found: list[Unordered], num_devices: int) -> None:
        self.computation, self.walk, self.found, self.num_devices = computation, walk, found, num_devices
        self.walked, self.values = Walked(), {}
        self.met: dict[str, tuple[set[Met], bool]] = {}

    def run(self) -> Walked:
        for name, instruction in self.computation.instructions.items():
            operands = [self.values[operand] for operand in instruction.operands if operand in self.values]
            self.values[name] = self._value(instruction, operands)
        self.walked.result = self.values[self.computation.root.name]
        return self.walked

    def _value(self, i: Instruction, operands: list[Tree]) -> Tree:
        called = i.called()
        match i.opcode:
            case "parameter":
                return _tree(i.type, ("parameter", int(i.payload)), frozenset())
            case "tuple" | "get-tuple-element" | "bitcast":
                return _same(i, operands)
            case "while":
                return self._nested(i, [(called["body"][0], operands), (called["condition"][0], operands)])
            case "conditional":
                return self._nested(i, list(zip(i.branches, ([one] for one in operands[1:]), strict=True)), operands[0])
            case "call":
                return self._nested(i, [(called["to_apply"][0], operands)])
        met = _met(i, self.num_devices)
        return _tree(i.type, i.name, self._start(i, [leaf for tree in operands for leaf in _leaves(tree)], met))

    def _nested(self, i: Instruction, calls: list[tuple[str, list[Tree]]], predicate: Tree = ()) -> Tree:
        """Return the result of computations that are run with these arguments."""
        used, kept, met = list(_leaves(predicate)), [], set()
        for number, (name, arguments) in enumerate(calls):
            walked, given = self.walk(name), dict(_named(arguments, "parameter"))
            used += [value for memory, value in given.items() if memory in walked.read]
            met |= walked.met
            # The result of a loop is that of its body.
            if i.opcode != "while" or number == 0:
                kept.append([given.get(leaf.memory) for leaf in _leaves(walked.result)])
        old = [_kept(every) for every in zip(*kept, strict=True)]
        if i.opcode == "while":
            carried = list(_leaves(calls[0][1][0]))
            old = [own if own == one else None for own, one in zip(carried, old, strict=True)]
            used += [own for own, one in zip(carried, old, strict=True) if one is None]
        after = self._start(i, used, met)
        return _tree(i.type, i.name, after, iter(old))

    def _start(self, i: Instruction, used: Sequence[Value], met: set[Met]) -> frozenset[str]:
        """Return what has ended when the results of an instruction are there, and note what may run beside it."""
        self.walked.read |= {value.memory for value in used}
        self.walked.met |= met
        after = frozenset[str]().union(*(value.after for value in used))
        is_nested = i.opcode in ("while", "conditional", "call")
        for name, (others, other_is_nested) in self.met.items():
            if (is_nested or other_is_nested) and name not in after and met & others:
                self.found.append(Unordered(name, i.name, frozenset(kind for kind, _ in met & others)))
        if met:
            self.met[i.name] = met, is_nested
        return after | {i.name} if met else after


def _met(i: Instruction, num_devices: int) -> set[Met]:
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS:
        return set()
    # All devices take part in a permute, whatever its pairs.
    groups = ((),) if kind == "collective-permute" else read_groups(i, num_devices=num_devices)
    assert groups is not None
    return {(kind, group) for group in groups}


def _same(i: Instruction, operands: list[Tree]) -> Tree:
    if i.opcode == "tuple":
        return tuple(operands)
    return operands[0] if i.opcode == "bitcast" else operands[0][i.numbers("index")[0]]


def _kept(values: tuple[Value | None, ...]) -> Value | None:
    """Return the value that all branches pass on, if it is one and in the same memory."""
    first, *others = values
    is_one = first is not None and all(other is not None and other.memory == first.memory for other in others)
    return first if is_one else None


def _tree(type_: Type, memory: Hashable, after: frozenset[str], kept: Iterator[Value | None] | None = None) -> Tree:
    """Return the tree of new values, but for those that are kept."""
    if isinstance(type_, tuple):
        return tuple(_tree(part, (memory, place), after, kept) for place, part in enumerate(type_))
    return (next(kept) if kept else None) or Value(memory, after)


def _leaves(tree: Tree) -> Iterator[Value]:
    return (value for _, value in _named(tree, ()))


def _named(tree: Tree, name: Hashable) -> Iterator[tuple[Hashable, Value]]:
    """Yield the values of a tree, each with the name that `_tree` gives to its memory."""
    if isinstance(tree, Value):
        yield name, tree
    else:
        for place, part in enumerate(tree):
            yield from _named(part, (name, place))
