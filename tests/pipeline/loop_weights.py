"""Find copies, transposes, joins and casts of weights inside the loops of a compiled step.

Where a value comes from is followed from the entry's parameters through loops, branches and calls. What depends on
weights and on nothing else, numbers and places aside, could be made once a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from trellax.programs.hlo import Array, Computation, HloModule, Instruction, Type, leaves

NOTHING, WEIGHTS, DATA = 0, 1, 2
"""Kinds of values by what they depend on; each includes those before it."""

Origin = Any
"""One of these, or a tuple of origins."""

_SAME = ("bitcast", "call", "opt-barrier")


@dataclass(frozen=True)
class Made:
    """An array that a loop computes from weights alone, and the operations that compute it."""

    name: str
    num_bytes: int
    kinds: frozenset[str]


def made_of_weights(program: HloModule) -> list[Made]:
    """Return what the loops of a step make of the matrices of its layers alone; slices that products read themselves,
    inside one call, are none."""
    walk = _Walk(program)
    entry = program.entry.instructions.values()
    given = {int(i.payload): _origin_of_argument(i) for i in entry if i.opcode == "parameter"}
    walk.enter(program.entry.name, tuple(given[number] for number in sorted(given)))
    assert WEIGHTS in given.values()
    return list(walk.found.values())


def _origin_of_argument(parameter: Instruction) -> int:
    """[chunks, ranks, layers, rows, columns] of `params.stages`: norms and biases are vectors, and small."""
    dims = next(leaves(parameter.type)).dims
    is_matrix = len(dims) == 5 and "params.stages" in parameter.op_name and "opt_state" not in parameter.op_name
    return WEIGHTS if is_matrix else DATA


class _Walk:
    def __init__(self, program: HloModule) -> None:
        self.program, self.found = program, {}
        inside = {name for _, i in program.instructions() for name in i.called().get("calls", ())}
        self._watched = program.in_loops() - inside
        self._results: dict[tuple[str, Origin], Origin] = {}

    def enter(self, name: str, arguments: Origin) -> Origin:
        """Return where a computation's result comes from, given the same of its parameters."""
        key = name, arguments
        if key not in self._results:
            computation, values = self.program.computations[name], {}
            for instruction in computation.instructions.values():
                values[instruction.name] = self._follow(computation, instruction, values, arguments)
            self._results[key] = values[computation.root.name]
        return self._results[key]

    def _follow(self, computation: Computation, i: Instruction, values: dict[str, Origin], arguments: Origin) -> Origin:
        own = [values[name] for name in i.operands]
        match i.opcode:
            case "parameter":
                return arguments[int(i.payload)]
            case "tuple":
                return tuple(own)
            case "get-tuple-element":
                return own[0][i.numbers("index")[0]]
            case "while":
                return self._loop(i, own[0])
            case "conditional":
                return reduce(_join, map(self.enter, i.branches, ((one,) for one in own[1:])))
        return self._compute(computation, i, own)

    def _compute(self, computation: Computation, i: Instruction, own: list[Origin]) -> Origin:
        called = i.called().get("calls") or (i.called().get("to_apply") if i.opcode == "call" else None)
        origin = self.enter(called[0], tuple(own)) if called and "-done" not in i.opcode else _spread(i.type, own)
        if i.opcode not in _SAME and not i.opcode.endswith("-start") and computation.name in self._watched:
            self._note(computation, i, origin)
        return origin

    def _loop(self, instruction: Instruction, state: Origin) -> Origin:
        body = instruction.called()["body"][0]
        while (after := _join(state, self.enter(body, (state,)))) != state:
            state = after
        return state

    def _note(self, computation: Computation, instruction: Instruction, origin: Origin) -> None:
        parts = zip(leaves(instruction.type), _flat(origin), strict=True)
        num_bytes = sum(leaf.num_bytes for leaf, one in parts if one == WEIGHTS)
        self.found.pop(instruction.name, None)
        if num_bytes:
            is_second_half = instruction.opcode.endswith("-done")
            work = computation.instructions[instruction.operands[0]] if is_second_half else instruction
            kinds = frozenset(self._kinds(work)) - {"parameter", "constant", "bitcast"}
            self.found[instruction.name] = Made(instruction.name, num_bytes, kinds)

    def _kinds(self, instruction: Instruction) -> Iterator[str]:
        called = instruction.called().get("calls", ())
        for inner in (i for name in called for i in self.program.computations[name].instructions.values()):
            yield from self._kinds(inner)
        is_index = isinstance(instruction.type, Array) and not instruction.type.dims
        if not called and not is_index:
            yield instruction.opcode


def _spread(type_: Type, operands: list[Origin]) -> Origin:
    """Return the origin of an ordinary result: the widest of its operands' origins. Scalars are indices, not data."""
    if not isinstance(type_, Array):
        return tuple(_spread(part, operands) for part in type_)
    return max((one for origin in operands for one in _flat(origin)), default=NOTHING) if type_.dims else NOTHING


def _join(a: Origin, b: Origin) -> Origin:
    return tuple(map(_join, a, b)) if isinstance(a, tuple) else max(a, b)


def _flat(origin: Origin) -> list[int]:
    return [one for part in origin for one in _flat(part)] if isinstance(origin, tuple) else [origin]
