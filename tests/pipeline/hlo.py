"""Reading a compiled program: its computations, which of them lie in loops, and who takes part in a collective."""

import math
import re
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One communication: kind, the computation it is in, how many arrays it carries, groups of devices."""

    kind: str
    computation: str
    num_arrays: int
    groups: tuple[tuple[int, ...], ...]


class Program:
    """The text of a compiled module, taken apart."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                lines = self.computations.setdefault(head[1], [])
            elif _INSTRUCTION.match(line):
                lines.append(line)

    @property
    def num_instructions(self) -> int:
        return sum(map(len, self.computations.values()))

    def in_loops(self) -> set[str]:
        """Return the computations that run inside some loop."""
        text = "\n".join(line for lines in self.computations.values() for line in lines)
        found, left = set(), re.findall(r"(?:body|condition)=%?([\w.-]+)", text)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self._called(name)
        return found

    def collectives(self) -> list[Collective]:
        return [
            Collective(kind, name, _num_arrays(line), _groups(line))
            for name, lines in self.computations.items()
            for line in lines
            for kind in COLLECTIVES
            if re.search(rf" {kind}(?:-start)?\(", line)
        ]

    def _called(self, name: str) -> list[str]:
        text = "\n".join(self.computations[name])
        branches = [word.strip(" %") for names in _BRANCHES.findall(text) for word in names.split(",")]
        return _CALLED.findall(text) + branches


def _num_arrays(line: str) -> int:
    """An all-reduce of several arrays has a tuple as its type."""
    kind = line.split(" = ", 1)[1]
    return len(re.findall(r"\w+\[[\d,]*\]", kind[: kind.index(") ")])) if kind.startswith("(") else 1


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Read the device groups, in any of the four ways that XLA writes them."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line):
        return tuple(tuple(map(int, group.split(","))) for group in found[1].split("},{"))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = [int(size) for size in found[3].split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if found[4]:
            ids = ids.transpose([int(axis) for axis in found[4].split(",")])
        return tuple(map(tuple, ids.reshape(int(found[1]), int(found[2])).tolist()))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        pairs = [pair.split("=") for pair in found[1].split(",")]
        names, sizes = [name for name, _ in pairs], [int(size) for _, size in pairs]
        inner = [names.index(name) for name in found[2].split(",")]
        outer = [axis for axis in range(len(names)) if axis not in inner]
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(outer + inner)
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[axis] for axis in inner)).tolist()))
    raise AssertionError(f"no device groups in: {line[:300]}")
