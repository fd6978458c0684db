"""The assertions that users write about their own programs, the tables of their failures, and the picture."""

import base64
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from trellax.commands.inspect_step import report_step
from trellax.programs import (
    Hardware,
    ProgramReport,
    assert_fits,
    assert_sends_at_most,
    assert_sends_near_minimum,
    compilations,
    draw_report,
    format_report,
)
from trellax.programs.memory import kept_bytes

from .steps import compiled_step, report_of, setup_of

HARDWARE = Hardware(
    name="test",
    memory_bytes=500_000,
    memory_bytes_per_s=1e9,
    matrix_flops_per_s={"f32": 1e9},
    vector_flops_per_s=1e8,
    link_bytes_per_s=1e8,
    network_bytes_per_s=1e6,
)


def sent(report: ProgramReport, axis: str) -> float:
    return next(row.bytes for row in report.traffic if (row.axis, row.kind) == (axis, "all kinds"))


def test_a_program_within_its_limits_passes() -> None:
    report = report_of("2x2x2")
    assert_fits(report, memory_bytes=report.memory.total)
    assert_sends_at_most(report, over="tensor", max_bytes=sent(report, "tensor"))
    assert_sends_at_most(report, over="nowhere", max_bytes=0)
    assert_sends_near_minimum(report, over="data", max_ratio=1.0)


def test_a_program_that_takes_more_fails_with_its_memory() -> None:
    report = report_of("2x2x2")
    with pytest.raises(AssertionError, match=r"(?s)of each device, .* more than .*activations.*temporary.*total"):
        assert_fits(report, memory_bytes=report.memory.total - 1)


def test_a_program_that_sends_more_fails_with_its_largest_collectives() -> None:
    report = report_of("2x2x2")
    with pytest.raises(AssertionError) as caught:
        assert_sends_at_most(report, over="tensor", max_bytes=sent(report, "tensor") - 1)
    text = str(caught.value)
    assert "over tensor from the busiest device, more than" in text
    assert re.search(r"pipe\+data +all-reduce +1", text)
    head, *rows = text[text.index("largest ") :].splitlines()
    assert head.split() == ["largest", "from", "count", "bytes"]
    sizes = [int(row.split()[-1].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0


def test_compilations_are_listed_and_earlier_ones_are_not() -> None:
    double = jax.jit(lambda x: 2 * x)
    with compilations() as first:
        double(np.ones(5, np.float32))
    with compilations() as second:
        double(np.ones(5, np.float32))
    assert any("lambda" in line for line in first)
    assert second == []


def test_a_program_above_its_minimum_fails() -> None:
    with pytest.raises(AssertionError, match=r"sends 1\.50\d times the minimum over pipe, more than 1\.02"):
        assert_sends_near_minimum(report_of("2x1x4"), over="pipe")
    with pytest.raises(AssertionError, match="has no minimum over elsewhere"):
        assert_sends_near_minimum(report_of("2x1x4"), over="elsewhere")


def test_table_of_a_program_that_does_not_fit_has_the_excess() -> None:
    report = report_step(compiled_step("2x2x2"), setup_of("2x2x2"), hardware=HARDWARE)
    assert report.fits is False
    too_much = report.memory.total - HARDWARE.memory_bytes
    assert f"does not fit: {too_much / 2**20:.1f} MiB too much" in format_report(report)


@pytest.mark.parametrize(
    ("limit", "capacity", "verdict"),
    [(1.1, 2.0, "fits"), (0.9, 2.0, "over XLA's limit"), (0.5, 0.9, "does not fit"), (None, 2.0, "fits")],
)
def test_verdict_distinguishes_xla_s_limit_from_the_capacity(
    limit: float | None, capacity: float, verdict: str
) -> None:
    total, kept = report_of("2x2x2").memory.total, kept_bytes(compiled_step("2x2x2").memory_analysis())
    # XLA plans for what is kept, and 95% of the rest of what is available.
    base = None if limit is None else int(kept + (limit * total - kept) / 0.95)
    hardware = replace(HARDWARE, memory_bytes=int(capacity * total), compiler_base_bytes=base)
    report = report_step(compiled_step("2x2x2"), setup_of("2x2x2"), hardware=hardware)
    assert report.to_dict()["verdict"] == report.memory.verdict == verdict
    assert f"\n{verdict}: " in format_report(report)
    assert draw_report(report).startswith(b"\x89PNG")
    assert_fits(report, memory_bytes=total, limit="device")
    if verdict == "over XLA's limit":
        assert "(45%)" in format_report(report)
        with pytest.raises(AssertionError, match=r"over XLA's limit; limit='device' allows it"):
            assert_fits(report, memory_bytes=total)


def test_roofline_shares_add_up_and_follow_the_slowest_link() -> None:
    near = report_step(compiled_step("2x2x2"), setup_of("2x2x2"), hardware=HARDWARE)
    far = report_step(compiled_step("2x2x2"), setup_of("2x2x2"), hardware=HARDWARE, devices_per_node=4)
    assert sum(near.roofline.values()) == pytest.approx(1)
    assert near.step_bound_s is not None
    assert far.step_bound_s is not None
    # Four devices a node: what crosses pipe now takes the network, which is a hundred times slower.
    # Groups over pipe+data have two devices in a node, and so two adapters.
    slower_s = sent(near, "pipe") * (1e-6 - 1e-8) + sent(near, "pipe+data") * (1e-6 / 2 - 1e-8)
    slower_s += sent(near, "pipe+data+tensor") * (1e-6 / 4 - 1e-8)
    assert far.step_bound_s - near.step_bound_s == pytest.approx(slower_s, rel=0.01)


@pytest.mark.parametrize("capacity", [None, 10**5, 10**9])
def test_picture_is_drawn(capacity: int | None) -> None:
    report = report_of("2x2x2")
    picture = draw_report(replace(report, memory=replace(report.memory, capacity=capacity)))
    assert picture.startswith(b"\x89PNG")


def test_picture_of_a_program_that_sends_nothing_is_drawn() -> None:
    assert draw_report(replace(report_of("2x2x2"), traffic=())).startswith(b"\x89PNG")


def test_notebook_shows_picture_and_tables() -> None:
    report = report_of("2x2x2")
    html = report._repr_html_()
    picture = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    assert picture == draw_report(report)
    assert "memory per device" in html
    assert f"{report.memory.total:,}" in html
