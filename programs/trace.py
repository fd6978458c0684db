"""Profiles of compiled programs: which instruction took how long, and what it kept busy.

The CPU runtime names its events after instructions of the compiled program; events of GPU kernels carry the name of the
instruction that launched them. Classes are those of `work.py`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from .execution_counts import count_executions
from .hardware import Hardware
from .hlo import HloModule
from .report import hlo_text
from .roofline import bound_time_s
from .work import CLASSES, Class, count_work


@dataclass(frozen=True, kw_only=True)
class TimedOperation:
    """An instruction, its class, how often it ran and how long in all, on all devices together.

    `bound_s` is the least that all runs would have taken by the device's peaks; 0 without them.
    """

    name: str
    op_name: str
    kind: Class
    count: int
    time_s: float
    bound_s: float = 0.0


def list_operations(
    folder: str | Path, compiled: Any, *, num_devices: int, hardware: Hardware | None = None
) -> tuple[TimedOperation, ...]:
    """Return the operations of a compiled program that a profile has seen, the longest first.

    Loops, branches and calls are left out: their time is that of what is inside.

    Args:
        folder: what `jax.profiler.trace` wrote to; the newest profile in it is read.
        hardware: one device, for the bounds.
    """
    text = hlo_text(compiled)
    program, module = HloModule.parse(text), text.split(maxsplit=2)[1].rstrip(",")
    work = count_work(program, count_executions(program, num_devices=num_devices), num_devices=num_devices)
    known = {operation.name: operation for operation in work.operations if operation.kind != "control"}
    totals: dict[str, list[float]] = {}
    # The type of an event's stats warns when it is made first (jax 0.12); as an error that aborts the process.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = list(_list_events(Path(folder), module))
    for name, time_s in events:
        if name in known:
            total = totals.setdefault(name, [0, 0.0])
            total[0] += 1
            total[1] += time_s
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


def sum_classes(operations: Sequence[TimedOperation]) -> Mapping[Class, float]:
    """Return the seconds of every class that took any."""
    sums = {kind: sum(one.time_s for one in operations if one.kind == kind) for kind in CLASSES}
    return {kind: time_s for kind, time_s in sums.items() if time_s}


def format_operations(operations: Sequence[TimedOperation], *, num_steps: int, top: int = 10) -> str:
    """Return the longest operations and the sums of classes as text, milliseconds a step on all devices together."""
    total_s = sum(one.time_s for one in operations)
    if not total_s:
        return "the profile holds no operation of the program"
    sums = [f"{kind} {time_s / total_s:.0%}" for kind, time_s in sum_classes(operations).items()]
    lines = [f"{1e3 * total_s / num_steps:,.1f} ms a step in operations, all devices together: {', '.join(sums)}"]
    if "communication" in sum_classes(operations):
        lines[0] += " (with waiting for others)"
    lines += [
        f"{one.time_s / total_s:6.1%} {1e3 * one.time_s / num_steps:9.2f} ms  {one.kind:<13} {one.name:<36.36} "
        f"{_shorten(one.op_name)}".rstrip()
        for one in operations[:top]
    ]
    return "\n".join(lines)


def _shorten(op_name: str) -> str:
    """The end of a path of jax's scopes, without the steps that say nothing."""
    parts = [part for part in op_name.split("/") if part not in _EMPTY_SCOPES]
    return "/".join(parts[-3:])


_EMPTY_SCOPES = ("while", "body", "eval_jaxpr", "closed_call", "cond", "shard_map", "branch_0_fun", "branch_1_fun")


def _list_events(folder: Path, module: str) -> Iterator[tuple[str, float]]:
    """Name and seconds of every event: of the devices' own where they have any, else of the threads of the host.

    Those that name another program than `module` are left out: its instructions may have the same names.
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
                told = {key: str(value) for key, value in event.stats if key in ("hlo_op", "hlo_module")}
                if told.get("hlo_module", module) == module:
                    yield told.get("hlo_op", event.name), 1e-9 * event.duration_ns
