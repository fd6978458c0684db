"""Sum the times of a profile by instruction and class.

The CPU runtime names its events after instructions of the compiled program; events of GPU kernels carry the name of the
instruction that launched them. The classes are those of `work.py`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..meshes.columns import align
from .execution_counts import count_executions
from .hardware import Hardware
from .hlo import HloModule
from .places import shorten_place
from .report import hlo_text
from .roofline import bound_time_s
from .work import CLASSES, WorkClass, count_work


@dataclass(frozen=True, kw_only=True)
class TimedOperation:
    """An instruction with its class, number of executions and total time on all devices.

    `bound_s` is the time of all executions at the device's peaks, 0 if these are unknown.
    """

    name: str
    op_name: str
    kind: WorkClass
    count: int
    time_s: float
    bound_s: float = 0.0


def list_operations(
    folder: str | Path, compiled: Any, *, num_devices: int, hardware: Hardware | None = None
) -> tuple[TimedOperation, ...]:
    """Return the operations of a compiled program that occur in a profile, the longest first.

    Loops, branches and calls are left out, since their time is that of the instructions inside.

    Args:
        folder: the folder given to `jax.profiler.trace`; its newest profile is read.
        hardware: peaks of one device, for the bounds.

    Raises:
        ValueError: the folder holds no profile.
    """
    text = hlo_text(compiled)
    program, module = HloModule.parse(text), text.split(maxsplit=2)[1].rstrip(",")
    work = count_work(program, count_executions(program, num_devices=num_devices), num_devices=num_devices)
    known = {operation.name: operation for operation in work.operations if operation.kind != "control"}
    totals = _sum_events(Path(folder), module, known=set(known), wrappers=_find_wrappers(program))
    found = [
        TimedOperation(
            name=name,
            op_name=known[name].op_name,
            kind=known[name].kind,
            count=int(count),
            time_s=time_s,
            bound_s=count * bound_time_s(known[name], hardware) if hardware else 0.0,
        )
        for name, (count, time_s) in totals.items()
    ]
    return tuple(sorted(found, key=lambda operation: -operation.time_s))


def _sum_events(folder: Path, module: str, *, known: set[str], wrappers: Mapping[str, str]) -> dict[str, list[float]]:
    """Return the number of events and the seconds of each known instruction that has any."""
    totals: dict[str, list[float]] = {}
    # In jax 0.12 reading an event's stats warns of a deprecation; as a Python error that would abort the C++ reader.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = list(_list_events(folder, module))
    for event, time_s in events:
        name = event if event in known else wrappers.get(event)
        if name in known:
            total = totals.setdefault(name, [0, 0.0])
            total[0] += 1
            total[1] += time_s
    return totals


def _find_wrappers(program: HloModule) -> dict[str, str]:
    """Return the fusion or asynchronous call around each instruction inside one.

    A product of cuBLAS that reads a slice in place is alone in such a fusion, and its kernel has its own name.
    """
    return {
        inner: outer.name
        for _, outer in program.instructions()
        if outer.opcode in ("fusion", "async-start")
        for names in outer.called().values()
        for name in names
        for inner in program.computations[name].instructions
    }


def sum_classes(operations: Sequence[TimedOperation]) -> Mapping[WorkClass, float]:
    """Return the seconds of every class with operations."""
    sums = {kind: sum(one.time_s for one in operations if one.kind == kind) for kind in CLASSES}
    return {kind: time_s for kind, time_s in sums.items() if time_s}


def format_operations(operations: Sequence[TimedOperation], *, num_steps: int, top: int = 10) -> str:
    """Format the longest operations and the sums of classes, in milliseconds per step on all devices."""
    total_s = sum(one.time_s for one in operations)
    if not total_s:
        return "the profile holds no operation of the program"
    sums = [f"{kind} {time_s / total_s:.0%}" for kind, time_s in sum_classes(operations).items()]
    head = f"{1e3 * total_s / num_steps:,.1f} ms a step in operations, all devices together: {', '.join(sums)}"
    if "communication" in sum_classes(operations):
        head += " (with waiting for others)"
    rows = [
        (
            f"{one.time_s / total_s:.1%}",
            f"{1e3 * one.time_s / num_steps:.2f} ms",
            one.kind,
            one.name[:_NAME_WIDTH],
            shorten_place(one.op_name),
        )
        for one in operations[:top]
    ]
    return f"{head}\n{align(rows, left=(2, 3, 4))}"


_NAME_WIDTH = 36


def _list_events(folder: Path, module: str) -> Iterator[tuple[str, float]]:
    """Yield name and seconds of every event, from the planes of devices if there are any, else from host threads.

    Events of other programs than `module` are left out, since their instructions may have the same names.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    data: Any = jax.profiler.ProfileData.from_file(str(newest))
    planes = list(data.planes)
    own = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in own or planes:
        for line in plane.lines:
            if line.name.startswith(("XLA ", "Steps")):
                continue
            for event in line.events:
                stats = {key: str(value) for key, value in event.stats if key in ("hlo_op", "hlo_module")}
                if stats.get("hlo_module", module) == module:
                    yield stats.get("hlo_op", event.name), 1e-9 * event.duration_ns
