"""Exposed communication of real GPU programs, counted again by reading the text line by line."""

import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .test_cuda import inspect

pytestmark = pytest.mark.cuda

EIGHT = 8
"""Devices of the one axis along which both steps below communicate."""

BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
SENT = {"all-gather": (EIGHT - 1) / EIGHT, "reduce-scatter": EIGHT - 1, "all-reduce": 2 * (EIGHT - 1) / EIGHT}
"""Bytes that a device sends per byte of the result."""

PRODUCTS = (" dot(", '"__cublas', '"__cudnn$fmha')


class Text:
    """A program as lines by computation; it shares no code with `trellax.programs`."""

    def __init__(self, text: str) -> None:
        self.lines: dict[str, list[str]] = {}
        self.entry = ""
        own: list[str] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                own = self.lines[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("  "):
                own.append(line)
        self.has_product = cache(self._has_product)

    def _has_product(self, name: str) -> bool:
        return any(map(self.is_product, self.lines[name]))

    def is_product(self, line: str) -> bool:
        called = re.findall(r"(?:calls|body)=%([\w.\-]+)", line)
        return any(word in line for word in PRODUCTS) or any(map(self.has_product, called))

    def runs(self, name: str, times: int, found: Counter[str]) -> Counter[str]:
        """How often each computation runs: loops of known length, one inside the other; these steps branch nowhere."""
        found[name] += times
        for line in self.lines[name]:
            assert " conditional(" not in line
            if body := re.search(r"body=%([\w.\-]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                assert trips is not None
                self.runs(body[1], times * int(trips[1]), found)
        return found

    def kind(self, line: str) -> str | None:
        """What a line sends: as its own opcode, or as that of the computation that it starts."""
        opcode = re.search(r" ([a-z\-]+)\(", line.partition("metadata=")[0])
        if opcode is None or opcode[1].endswith("-done"):
            return None
        called = re.findall(r"calls=%([\w.\-]+)", line) if "fusion" in opcode[1] or "async" in opcode[1] else []
        inside = [kind for name in called for kind in map(self.kind, self.lines[name]) if kind]
        return next((kind for kind in [opcode[1].removesuffix("-start"), *inside] if kind in SENT), None)

    def sums(self) -> tuple[float, float]:
        """Bytes that a device sends, and those of collectives that enclose no product."""
        sent, exposed = 0.0, 0.0
        for name, times in self.runs(self.entry, 1, Counter()).items():
            own = self.lines[name]
            for place, line in enumerate(own):
                kind = self.kind(line)
                if kind is None:
                    continue
                start = re.match(r"\s+(?:ROOT )?%([\w.\-]+) =", line)
                assert start is not None
                ends = [n for n, other in enumerate(own) if re.search(rf"-done\(%{re.escape(start[1])}\)", other)]
                result = own[ends[0]] if ends else line
                num_bytes = times * SENT[kind] * result_bytes(result)
                sent += num_bytes
                if not ends or not any(map(self.is_product, own[place + 1 : ends[0]])):
                    exposed += num_bytes
        return sent, exposed


def result_bytes(line: str) -> float:
    """The bytes of what a line returns, all arrays of a tuple."""
    type_ = re.split(r" [a-z\-]+\(", line.partition(" = ")[2])[0]
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", type_)
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in found)


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("tensor", "--mesh.tensor 8 --mesh.pipe 1 --pipeline.microbatches 16"),
        ("data", "--mesh.data 8 --mesh.tensor 1 --mesh.pipe 1 --pipeline.microbatches 8 --train.shard layer"),
    ],
    ids=["tensor=8", "data=8"],
)
def test_exposed_share_is_that_of_a_second_reading(axis: str, words: str, tmp_path: Path) -> None:
    report = inspect(f"llama3-8b-8gpu h200:8 --pipeline.remat dots {words}", hlo=str(tmp_path / "step.hlo"))
    rows = report["exposed"]
    assert isinstance(rows, list)
    assert [row["axis"] for row in rows] == [axis]
    sent, exposed = Text((tmp_path / "step.hlo").read_text()).sums()
    assert 0 < exposed < sent
    assert (rows[0]["bytes"], rows[0]["exposed_bytes"]) == pytest.approx((sent, exposed), rel=1e-9)


def test_a_step_over_the_limit_names_what_xla_did() -> None:
    words = "llama3-70b-64gpu h100:64/8 --mesh.sequence off --pipeline.remat dots"
    report = inspect(words)
    assert report["verdict"] == "does not fit"
    recomputed, synchronous = report["recomputed"], report["synchronous"]
    assert isinstance(recomputed, list)
    assert isinstance(synchronous, list)
    assert sum(one["moved_bytes"] for one in recomputed) > 2**30
    sums = [one for one in synchronous if (one["axis"], one["kind"]) == ("tensor", "all-reduce")]
    assert any("forward/" in one["place"] for one in sums)
    inside = inspect("llama3-70b-64gpu h100:64/8 --pipeline.remat dots")
    assert inside["recomputed"] == []


def test_the_parts_of_the_modelled_step_add_up_and_are_above_the_bound() -> None:
    report = inspect("llama3-8b-8gpu h200:8")
    times_s = report["step_time_s"]
    assert isinstance(times_s, dict)
    total_s = times_s.pop("total_s")
    assert sum(times_s.values()) == pytest.approx(total_s)
    exposed = report["exposed"]
    assert isinstance(exposed, list)
    assert sum(row["exposed_s"] for row in exposed) == pytest.approx(times_s["exposed_s"])
    assert all(0 <= row["exposed_s"] <= row["transfer_s"] for row in exposed)
    # The bubble of the schedule is 1.5%: 1 of 65 ticks.
    assert times_s["waiting_s"] / total_s == pytest.approx(report["bubble_fraction"], abs=0.005)


def share_of(report: Any, axis: str) -> float:
    """The share of bytes over an axis that enclose no product."""
    return next(row["share"] for row in report["exposed"] if row["axis"] == axis)


BETWEEN = (
    "llama3-70b-64gpu h100:64/8 --mesh.data 2 --mesh.pipe 4 --pipeline.remat dots --train.shard step "
    "--pipeline.microbatches 16 --pipeline.schedule interleaved-1f1b --pipeline.chunks 4"
)
"""More than XLA plans for on an absent H100, and less than on one that is there."""


def test_a_step_between_the_two_limits_is_compiled_as_it_would_run() -> None:
    as_run, as_absent = inspect(BETWEEN), inspect(BETWEEN, xla_flags="--xla_gpu_memory_limit_slop_factor=95")
    assert (as_run["verdict"], as_absent["verdict"]) == ("fits", "over XLA's limit")
    assert share_of(as_run, "tensor") < 0.7
    assert share_of(as_absent, "tensor") == 1
    assert as_run["recomputed"] == []
