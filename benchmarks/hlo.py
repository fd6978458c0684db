"""Reads compiled programs and their traces: how many instructions there are, and what was really executed.

The CPU runtime records an event for every executed instruction, under the instruction's name in the compiled HLO. So
counting events, times the flops of the matrix products behind each name, measures the executed work. Read `scopes.py`
next, which sums the durations of events by action.
"""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^)]*\)|\S+) ([\w\-]+)\((.*)$")
DIMENSIONS = re.compile(r"\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of compiled HLO: `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def shape(self) -> list[int]:
        """The dimensions of the result, of the first array if it is a tuple."""
        return _numbers(DIMENSIONS, self.type)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One instruction at work on one device."""

    name: str
    device: int
    start_s: float
    end_s: float


Program = dict[str, dict[str, Instruction]]
"""Computation name -> instruction name -> instruction."""


def parse_program(text: str) -> Program:
    """Return the instructions of compiled HLO text by computation."""
    program: Program = {}
    own: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            own = program.setdefault(header[1], {})
        elif match := INSTRUCTION.match(line):
            own[match[1]] = Instruction(name=match[1], type=match[2], opcode=match[3], rest=match[4])
    return program


def count_instructions(text: str) -> int:
    """Return the number of instructions in all computations of compiled HLO text."""
    return sum(len(own) for own in parse_program(text).values())


def matmul_flops(program: Program) -> dict[str, int]:
    """Return the flops of one execution of every instruction that holds matrix products, fusions included."""
    dots = {name: sum(_dot_flops(i, own) for i in own.values()) for name, own in program.items()}
    fused = {_called(i) for own in program.values() for i in own.values() if i.opcode == "fusion"}
    flops: dict[str, int] = {}
    for name, own in program.items():
        if name in fused:
            continue
        for instruction in own.values():
            inside = dots.get(_called(instruction), 0) if instruction.opcode == "fusion" else 0
            if work := inside + _dot_flops(instruction, own):
                flops[instruction.name] = work
    return flops


def instructions_of(program: Program, opcode: str) -> list[Instruction]:
    """Return all instructions of one kind."""
    return [i for own in program.values() for i in own.values() if i.opcode == opcode]


def count_executions(run: Callable[[], Any]) -> Counter[str]:
    """Return how often each instruction ran on all devices together during run(), by name."""
    return Counter(event.name for event in _trace(run))


def list_executions(run: Callable[[], Any], names: Collection[str]) -> list[Execution]:
    """Return every execution of the named instructions during run(), in order of start."""
    found = []
    for event in _trace(run):
        if event.name in names:
            device = dict(event.stats).get("device_ordinal")
            if device is not None:
                start_s, end_s = event.start_ns * 1e-9, event.end_ns * 1e-9
                found.append(Execution(name=event.name, device=device, start_s=start_s, end_s=end_s))
    return sorted(found, key=lambda execution: execution.start_s)


def _trace(run: Callable[[], Any]) -> Iterator[Any]:
    """Yield the events of all threads during run()."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data: Any = jax.profiler.ProfileData.from_file(str(path))
        for plane in data.planes:
            for line in plane.lines:
                yield from line.events


def _dot_flops(dot: Instruction, own: dict[str, Instruction]) -> int:
    if dot.opcode == "custom-call" and "matmul" in dot.rest:
        raise RuntimeError(f"a matrix product in a library call is not counted: {dot.name}")
    if dot.opcode != "dot":
        return 0
    (lhs,) = re.findall(r"%([\w.\-]+)", dot.rest)[:1]
    contracting = _numbers(re.compile(r"lhs_contracting_dims=\{([\d,]*)\}"), dot.rest)
    return 2 * math.prod(dot.shape) * math.prod(own[lhs].shape[dim] for dim in contracting)


def _called(instruction: Instruction) -> str:
    match = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    return match[1] if match else ""


def _numbers(pattern: re.Pattern[str], text: str) -> list[int]:
    match = pattern.search(text)
    return [int(number) for number in match[1].split(",") if number] if match else []
