"""Format a report as text tables: memory, traffic and work of one device."""

from collections.abc import Sequence

from ..meshes.columns import align
from .report import ProgramReport
from .timeline.schedule_report import ScheduleReport
from .traffic import Traffic
from .work import CLASSES

_MEBI = 2**20
_GIBI = 2**30


def format_report(report: ProgramReport) -> str:
    """Return the tables of memory, traffic and work, and notes on counts that are not exact."""
    notes = "".join(f"\nnote: {note}" for note in report.notes)
    parts = [format_memory(report), format_traffic(report.traffic), format_work(report)]
    if report.schedule.exposed or report.schedule.step_time:
        parts.insert(2, format_schedule(report.schedule))
    return "\n\n".join(parts) + notes


def format_memory(report: ProgramReport) -> str:
    """Return the table of memory by purpose, and whether the program fits."""
    memory = report.memory
    lines = [("memory per device", "bytes", "share")]
    lines += [(name, f"{size:,}", f"{size / memory.total:.1%}") for name, size in memory.classes.items()]
    lines.append(("total", f"{memory.total:,}", format_bytes(memory.total)))
    if memory.host:
        lines.append(("on the host", f"{memory.host:,}", format_bytes(memory.host)))
    if memory.capacity is None or memory.free is None:
        return align(lines)
    lines.append(("capacity", f"{memory.capacity:,}", format_bytes(memory.capacity)))
    if memory.limit is not None:
        lines.append(("XLA's limit", f"{memory.limit:,}", format_bytes(memory.limit)))
    rest = "left" if memory.free >= 0 else "too much"
    text = f"{align(lines)}\n{memory.verdict}: {format_bytes(abs(memory.free))} {rest}"
    if memory.verdict == "over XLA's limit" and memory.limit is not None:
        text += (
            f"\nXLA plans for {format_bytes(memory.limit)} ({memory.limit / memory.capacity:.0%}). "
            f"{format_bytes(memory.total - memory.limit)} beyond it, it computes again\nwhat it could keep, and makes "
            "collectives wait for each other."
        )
    return text


def format_traffic(rows: Sequence[Traffic]) -> str:
    """Return the table of bytes that the busiest device sends in a step, by axes and kind, beside the minimum."""
    lines = [("sent per device and step", "kind", "count", "bytes", "minimum", "ratio")]
    for axis in dict.fromkeys(row.axis for row in rows):
        *kinds, whole = (row for row in rows if row.axis == axis)
        if len(kinds) > 1:
            lines += [("", row.kind, f"{row.count:,}", f"{row.bytes:,.0f}", "", "") for row in kinds]
        kind = kinds[0].kind if len(kinds) == 1 else whole.kind
        least = "" if whole.minimum_bytes is None else f"{whole.minimum_bytes:,.0f}"
        ratio = "" if whole.ratio is None else f"{whole.ratio:.2f}"
        lines.append((axis, kind, f"{whole.count:,}", f"{whole.bytes:,.0f}", least, ratio))
    return align(lines, left=2) if rows else "nothing is sent"


def format_schedule(schedule: ScheduleReport) -> str:
    """Return the table of collectives that enclose no product, by axes, the modelled step, and XLA's own changes."""
    lines = [("encloses no product", "count", "of", "bytes", "share", "seconds", "exposed")]
    for row in schedule.exposed:
        counts = row.axis, f"{row.exposed_count:,}", f"{row.count:,}", f"{row.exposed_bytes:,.0f}", f"{row.share:.1%}"
        lines.append((*counts, _format_s(row.transfer_s), _format_s(row.exposed_s)))
    parts = [align(lines)]
    step = schedule.step_time
    if step is not None:
        parts.append(
            f"modelled step {step.total_s:.3g} s: products {step.matrix_s:.3g}, vector {step.vector_s:.3g}, launches "
            f"{step.launches_s:.3g}, exposed communication {step.exposed_s:.3g}, waiting {step.waiting_s:.3g}"
        )
    if schedule.synchronous:
        lines = [("synchronous", "kind", "from", "count", "bytes")]
        lines += [(c.axis, c.kind, c.place, f"{c.count:,}", f"{c.bytes:,.0f}") for c in schedule.synchronous[:_TOP]]
        parts.append("\n" + align(lines, left=3))
    if schedule.recomputed:
        found = schedule.recomputed[:_TOP]
        lines = [("XLA computes again", "runs", "flops", "bytes moved")]
        lines += [(r.place, f"{r.count:,}", f"{r.flops:.3g}", f"{r.moved_bytes:.3g}") for r in found]
        parts.append(f"\n{align(lines)}\n{_REMEDY}")
    return "\n".join(parts)


def _format_s(time_s: float | None) -> str:
    return "" if time_s is None else f"{time_s:.3g}"


_TOP = 6
_REMEDY = (
    "XLA does so by itself over its memory limit, and makes collectives synchronous. It helps to need less\n"
    "(--pipeline.remat full, --train.shard step, --mesh.sequence on, more microbatches), or to move the limit:\n"
    "XLA_FLAGS=--xla_gpu_memory_limit_slop_factor=N, in percent, of which `trellax train` goes to 100 by itself."
)


def format_work(report: ProgramReport) -> str:
    """Return the table of flops, bytes moved and share of the roofline time by class."""
    lines = [("work per device and step", "flops", "bytes moved", "roofline")]
    for kind in CLASSES:
        flops = f"{report.flops[kind]:.4g}" if kind in report.flops else ""
        moved = f"{report.moved_bytes[kind]:.4g}" if kind in report.moved_bytes else ""
        share = f"{report.roofline[kind]:.1%}" if report.roofline else ""
        lines.append((kind, flops, moved, share))
    text = align(lines)
    if report.model_flops is not None and report.recompute_flops is not None:
        again = report.recompute_flops / report.model_flops
        text += f"\nmodel {report.model_flops:.4g} flops, recomputed {report.recompute_flops:.4g} ({again:.1%})"
    if report.step_bound_s is not None:
        text += f"\nat peak, one after another: {report.step_bound_s:.4g} s a step, without bubbles"
    return text


def format_bytes(size: float) -> str:
    """Return a size in GiB, or in MiB below 1 GiB."""
    return f"{size / _GIBI:,.1f} GiB" if abs(size) >= _GIBI else f"{size / _MEBI:,.1f} MiB"
