"""Format the report on an engine's programs as text and as numbers for JSON."""

from dataclasses import asdict
from typing import Any

from ...meshes.columns import align
from ...programs.report_tables import format_bytes
from .costs import Costs
from .report import ServeReport


def format_serving(report: ServeReport) -> str:
    """Return the tables of memory and of the costs of decoding and prefill."""
    return "\n\n".join((_format_memory(report), _format_costs(report), _format_traffic(report)))


def _format_memory(report: ServeReport) -> str:
    memory = report.memory
    lines = [("memory per device", "bytes", "share")]
    for name in ("weights", "cache", "state", "temporary"):
        size = getattr(memory, name)
        lines.append((name, f"{size:,}", f"{size / memory.total:.1%}"))
    lines.append(("total", f"{memory.total:,}", format_bytes(memory.total)))
    if memory.capacity is None:
        return align(lines)
    free = memory.capacity - memory.total
    lines.append(("capacity", f"{memory.capacity:,}", format_bytes(memory.capacity)))
    verdict = "fits: " if free >= 0 else "does not fit: "
    return f"{align(lines)}\n{verdict}{format_bytes(abs(free))} {'left' if free >= 0 else 'too much'}"


def _format_costs(report: ServeReport) -> str:
    """Return what a tick of decoding and one of prefill move and start on the busiest device."""
    decode, prefill = report.decode, report.prefill
    sequences = "1 sequence" if report.rows == 1 else f"{report.rows} sequences"
    lines = [("bytes moved per tick", "decode", "prefill")]
    read = prefill.moved_bytes
    lines += [(part, f"{moved:,.0f}", f"{read[part]:,.0f}") for part, moved in decode.moved_bytes.items()]
    lines.append(("all", f"{decode.total_bytes:,.0f}", f"{prefill.total_bytes:,.0f}"))
    lines.append(("kernels", f"{decode.kernels:,}", f"{prefill.kernels:,}"))
    lines.append(("collectives", f"{decode.collectives:,}", f"{prefill.collectives:,}"))
    lines.append(("ms at peak rates", _milliseconds(decode), _milliseconds(prefill)))
    text = (
        f"{align(lines)}\n"
        f"decode: a token of {sequences} of {report.context:,} cached tokens; prefill: the first "
        f"{report.sizes.chunk:,} tokens of a prompt\n"
        f"decode moves {report.ratio:.3f} times what it must read: {report.least_weights:,.0f} of weights, "
        f"{report.least_cache:,.0f} of cache"
    )
    if report.token_s is not None and report.ticks > 1:
        text += f"\na token passes {report.ticks} ticks: {1e3 * report.token_s:.3f} ms at peak rates"
    return text


def _milliseconds(costs: Costs) -> str:
    return "" if costs.time_s is None else f"{1e3 * costs.time_s:.3f}"


def _format_traffic(report: ServeReport) -> str:
    lines = [["sent per device and tick", "kind", "decode", "bytes", "prefill", "bytes"]]
    own = [{(row.axis, row.kind): row for row in costs.traffic} for costs in (report.decode, report.prefill)]
    for axis, kind in dict.fromkeys((*own[0], *own[1])):
        words = [axis, kind]
        for rows in own:
            row = rows.get((axis, kind))
            words += ["", ""] if row is None else [f"{row.count:,}", f"{row.bytes:,.0f}"]
        lines.append(words)
    return align(lines, left=2) if len(lines) > 1 else "nothing is sent"


def serving_numbers(report: ServeReport) -> dict[str, Any]:
    """Return the report in plain numbers, for JSON."""
    return {
        "target": report.target,
        "devices": report.devices,
        "rows": report.rows,
        "context": report.context,
        "chunk": report.sizes.chunk,
        "ticks": report.ticks,
        "memory_bytes": {**asdict(report.memory), "total": report.memory.total},
        "decode": _numbers(report.decode),
        "prefill": _numbers(report.prefill),
        "least_bytes": {"weights": report.least_weights, "cache": report.least_cache},
        "ratio": report.ratio,
        "token_s": report.token_s,
        "compile_s": report.compiled.compile_s,
    }


def _numbers(costs: Costs) -> dict[str, Any]:
    return {
        "moved_bytes": dict(costs.moved_bytes) | {"all": costs.total_bytes},
        "kernels": costs.kernels,
        "collectives": costs.collectives,
        "traffic": [
            {"axis": row.axis, "kind": row.kind, "count": row.count, "bytes": row.bytes} for row in costs.traffic
        ],
        "time_s": costs.time_s,
    }
