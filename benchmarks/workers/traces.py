"""Count executed instructions in profiler traces, and the flops of the matrix products among them.

The CPU runtime records one event per executed instruction, named as in the compiled HLO. The number of events of an
instruction times its flops is therefore the executed work. Read `scopes.py` next, which sums the durations of events by
action.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from trellax.programs.hlo import HloModule, Instruction
from trellax.programs.matmul import matrix_flops


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One execution of one instruction on one device."""

    name: str
    device: int
    start_s: float
    end_s: float


def matmul_flops(program: HloModule) -> dict[str, int]:
    """Return the flops per execution of every instruction that contains matrix products, including fusions.

    Raises:
        RuntimeError: a library call is named after a product, and its flops are not known.
    """
    fused = {name for _, i in program.instructions() if i.opcode == "fusion" for name in i.called()["calls"]}
    inside = {name: sum(_flops(program, name).values()) for name in fused}
    flops: dict[str, int] = {}
    for name in program.computations.keys() - fused:
        flops |= _flops(program, name)
        for instruction in program.computations[name].instructions.values():
            if instruction.opcode == "fusion":
                flops[instruction.name] = sum(inside[called] for called in instruction.called()["calls"])
    return {name: work for name, work in flops.items() if work}


def instructions_of(program: HloModule, opcode: str) -> list[Instruction]:
    """Return all instructions of one kind."""
    return [instruction for _, instruction in program.instructions() if instruction.opcode == opcode]


def count_traced(run: Callable[[], Any]) -> Counter[str]:
    """Count the executions of each instruction during run(), summed over all devices, by name."""
    return Counter(event.name for event in _trace(run))


def list_traced(run: Callable[[], Any], names: Collection[str]) -> list[Execution]:
    """Return all executions of the named instructions during run(), in order of start."""
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


def _flops(program: HloModule, name: str) -> dict[str, int]:
    computation = program.computations[name]
    found = {i.name: matrix_flops(i, computation) for i in computation.instructions.values()}
    for instruction in computation.instructions.values():
        if "matmul" in instruction.text("custom_call_target") and not found[instruction.name]:
            raise RuntimeError(f"a matrix product in a library call is not counted: {instruction.name}")
    return found
