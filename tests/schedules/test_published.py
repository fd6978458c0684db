"""The async clock computes the bubble rates that Zero Bubble prints in Table 5, to every digit."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from trellax.schedules import build_schedule, simulate

ROWS = tomllib.loads(Path(__file__).with_name("table5.toml").read_text(encoding="utf-8"))["row"]
COSTS = ("forward", "input_grad", "weight_grad", "transfer")


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-m{row['microbatches']}")
def test_bubble_rate_of_table_5(name: str, row: dict[str, Any]) -> None:
    schedule = build_schedule(name, num_ranks=row["ranks"], num_microbatches=row["microbatches"], clock="async")
    timing = simulate(schedule, clock="async", **{cost: row[cost] for cost in COSTS})
    work = row["microbatches"] * (row["forward"] + row["input_grad"] + row["weight_grad"])
    assert f"{(timing.makespan - work) / timing.makespan:.4f}" == row[name]
    # Every rank has the same work, so this is what the simulator calls the bubble fraction.
    assert timing.bubble_fraction == pytest.approx((timing.makespan - work) / timing.makespan, abs=1e-12)


def test_table_5_has_twelve_rows() -> None:
    assert len(ROWS) == 12
