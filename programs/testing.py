"""Assertions about compiled programs: a test fails if a step needs more memory or sends more than it should.

    def test_my_step_is_lean():
        report = inspect_compiled(jax.jit(step).lower(state, batch).compile(), mesh, parameters=state.params)
        assert_fits(report, memory_bytes=80 * 10**9)
        assert_sends_at_most(report, over="tensor", max_bytes=2**30)

A failure prints the table, which shows what grew. `compilations` lists the programs that jax compiles in a block. Read
`pytest_plugin.py` next, for fake devices in tests.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import jax

from ..meshes import ProgramError
from ..meshes.arguments import check_choice, check_number
from ..meshes.columns import align
from .report import ProgramReport
from .report_tables import format_bytes, format_memory, format_traffic
from .traffic import EVERY_KIND

_MOST_LINES = 8


def assert_fits(report: ProgramReport, *, memory_bytes: float, limit: Literal["xla", "device"] = "xla") -> None:
    """Fail unless the program needs at most `memory_bytes` per device and is within XLA's own limit.

    Args:
        limit: "device" ignores XLA's own limit, over which XLA rematerialises and serialises collectives. Only reports
            for GPUs have that limit.

    Raises:
        AssertionError: the program needs more; the message has the memory by purpose.
        ProgramError: `memory_bytes` is not a number of 0 or more, or `limit` is not one of its choices.
    """
    __tracebackhide__ = True
    check_number("memory_bytes", memory_bytes, error=ProgramError)
    check_choice("limit", limit, ("xla", "device"), error=ProgramError)
    total = report.memory.total
    if total > memory_bytes:
        raise AssertionError(
            f"the program takes {format_bytes(total)} ({total:,} bytes) of each device, "
            f"{format_bytes(total - memory_bytes)} more than {memory_bytes:,.0f} bytes.\n{format_memory(report)}"
        )
    if limit == "xla" and report.memory.verdict == "over XLA's limit":
        raise AssertionError(f"the program is over XLA's limit; limit='device' allows it.\n{format_memory(report)}")


def assert_sends_at_most(report: ProgramReport, *, over: str, max_bytes: float) -> None:
    """Fail unless the busiest device sends at most `max_bytes` per run over these mesh axes (`tensor`, `pipe+data`).

    Raises:
        AssertionError: it sends more; the message has the traffic and the largest collectives over these axes.
        ProgramError: `max_bytes` is not a number of 0 or more.
    """
    __tracebackhide__ = True
    check_number("max_bytes", max_bytes, error=ProgramError)
    sent = sum(row.bytes for row in report.traffic if (row.axis, row.kind) == (over, EVERY_KIND))
    if sent > max_bytes:
        raise AssertionError(
            f"the program sends {sent:,.0f} bytes over {over} from the busiest device, more than {max_bytes:,.0f}.\n"
            f"{format_traffic(report.traffic)}\n\n{_describe_largest(report, over)}"
        )


def assert_sends_near_minimum(report: ProgramReport, *, over: str, max_ratio: float = 1.02) -> None:
    """Fail unless the traffic over these axes is at most `max_ratio` times the minimum in the report.

    Raises:
        AssertionError: it is more, or the report has no minimum for these axes.
        ProgramError: `max_ratio` is not a number of 0 or more.
    """
    __tracebackhide__ = True
    check_number("max_ratio", max_ratio, error=ProgramError)
    ratios = [row.ratio for row in report.traffic if (row.axis, row.kind) == (over, EVERY_KIND)]
    if not ratios or ratios[0] is None or ratios[0] > max_ratio:
        what = f"has no minimum over {over}"
        if ratios and ratios[0] is not None:
            what = f"sends {ratios[0]:.3f} times the minimum over {over}, more than {max_ratio}"
        raise AssertionError(
            f"the program {what}.\n{format_traffic(report.traffic)}\n\n{_describe_largest(report, over)}"
        )


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yield a list to which jax adds a line for each program that it compiles in the block.

    >>> with compilations() as compiled:
    ...     jax.jit(jnp.sin)(1.0)
    >>> len(compiled) > 0
    True
    """
    compiled: list[str] = []
    handler = _Collector(compiled)
    logger = logging.getLogger("jax._src.interpreters.pxla")
    # Not passed on, or other handlers would print every line.
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield compiled
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Collector(logging.Handler):
    """A logging handler that appends messages to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def _describe_largest(report: ProgramReport, axis: str) -> str:
    """Return a table of the collectives over an axis that send most, with their places in the user's program."""
    found = [collective for collective in report.collectives if collective.axis == axis]
    found.sort(key=lambda collective: -collective.sent_bytes.max())
    lines = [("largest", "count", "bytes", "from")]
    lines += [(c.name, f"{c.count.max():,}", f"{c.sent_bytes.max():,.0f}", c.op_name) for c in found[:_MOST_LINES]]
    return align([(name, source, count, size) for name, count, size, source in lines], left=2)
