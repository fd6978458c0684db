"""Explain the times of schedules in words: the order by each clock, losses to 1F1B, and why clocks disagree."""

import math
from collections.abc import Mapping
from typing import Any

CLOCKS = {
    "unit": "simulated makespan, F = I = W",
    "ticks": "ticks with measured times",
    "wall": "measured step on shared cores",
}

Row = Mapping[str, Any]


def explain_actions(actions: Mapping[str, Any]) -> list[str]:
    """Name the costliest instruction of each action, which depends on the compiler and not on a schedule."""
    return [
        f"{name} backwards, the costliest instruction of each action: "
        + ", ".join(f"{kind} {one['share']:.0%} ({one['name']})" for kind, one in own["costliest"].items())
        for name, own in actions.items()
    ]


def compare_schedules(rows: list[Row], actions: Mapping[str, Any]) -> list[str]:
    """Compare schedules for one number of microbatches: the order by each clock, then each against 1F1B."""
    m = rows[0]["num_microbatches"]
    lines = [f"m={m}, fastest first by {text}: {_order(rows, clock)}" for clock, text in CLOCKS.items()]
    moved = [move for row in rows if (move := _describe_move(row, rows))]
    lines.append(f"m={m}, places by these three: {'; '.join(moved) or 'the same for all'}")
    return lines + [_against_1f1b(row, actions) for row in rows if row["schedule"] != "1f1b"]


def compare_vocabularies(report: Mapping[str, Any]) -> str:
    """Describe in a few sentences the effect of splitting a large vocabulary."""
    ends, split = report["rows"]["ends"], report["rows"]["split"]
    ratio = {
        key: split[key] / ends[key] for key in ("param_bytes", "temp_bytes", "ticks_s", "wall_s", "wall_s_min", "cpu_s")
    }
    more = split["all_reduces"]["a_microbatch"] - ends["all_reduces"]["a_microbatch"]
    names = {"ticks_s": "ticks", "wall_s": "step", "param_bytes": "parameters", "temp_bytes": "temporaries"}
    # Step times are noisy, so a loss counts only if both the median and the minimum show it.
    lost = [
        f"{name} {ratio[key]:.2f}"
        for key, name in names.items()
        if is_loss(min(ratio[key], ratio.get(f"{key}_min", math.inf)))
    ]
    return (
        f"With the vocabulary on the ends the last rank works {ends['last_over_mean']:.2f} times as long as the mean. "
        f"Split over all ranks it takes {ratio['ticks_s']:.2f} of the ticks, {ratio['param_bytes']:.2f} of the "
        f"parameter bytes and {ratio['temp_bytes']:.2f} of the temporary bytes of a device, for {more:.0f} all-reduces "
        f"over pipe more a microbatch. On shared cores, where balance gains nothing, its step takes "
        f"{ratio['wall_s']:.2f} of the wall and {ratio['cpu_s']:.2f} of the CPU seconds. "
        f"The ticks of split divide the measured head and embedding evenly over the ranks and count no all-reduce."
        + (f" LOSES to ends: {', '.join(lost)}." if lost else "")
    )


def is_loss(ratio: float) -> bool:
    """Return whether a ratio to the reference prints as more than 1.00."""
    return round(ratio, 2) > 1


def _order(rows: list[Row], clock: str) -> str:
    """List schedules with their ratios, with `=` between ratios that print alike."""
    ranked = sorted(rows, key=lambda row: round(row[f"{clock}_ratio"], 2))
    words, before = [], None
    for row in ranked:
        ratio = f"{row[f'{clock}_ratio']:.2f}"
        words.append(("= " if ratio == before else "< " if before else "") + f"{row['schedule']} {ratio}")
        before = ratio
    return " ".join(words)


def _describe_move(row: Row, rows: list[Row]) -> str:
    places = [_place(row, rows, clock) for clock in CLOCKS]
    return f"{row['schedule']} {', '.join(map(str, places))}" if len(set(places)) > 1 else ""


def _place(row: Row, rows: list[Row], clock: str) -> int:
    own = round(row[f"{clock}_ratio"], 2)
    return 1 + sum(round(other[f"{clock}_ratio"], 2) < own for other in rows)


def _against_1f1b(row: Row, actions: Mapping[str, Any]) -> str:
    unit, ticks, wall, cpu = (row[f"{clock}_ratio"] for clock in ("unit", "ticks", "wall", "cpu"))
    why = f", since {_explain_ticks(row, actions)}" if f"{unit:.2f}" != f"{ticks:.2f}" else ""
    least = {"unit": unit, "ticks": ticks, "wall": min(wall, row["wall_min_ratio"])}
    lost = [f"by {row[f'{clock}_ratio'] - 1:.0%} in {text}" for clock, text in CLOCKS.items() if is_loss(least[clock])]
    return (
        f"{row['schedule']}, m={row['num_microbatches']}: {unit:.2f} of 1f1b's ticks if F = I = W, {ticks:.2f} with "
        f"the times measured here{why}; on shared cores, where bubbles cost nothing, its step takes {wall:.2f} of "
        f"1f1b's ({cpu:.2f} of its CPU seconds)" + (f". LOSES to 1f1b {', '.join(lost)}" if lost else "")
    )


def _explain_ticks(row: Row, actions: Mapping[str, Any]) -> str:
    whole, halves = actions["whole"]["seconds"], actions["halves"]["seconds"]
    if row["backward"] == "whole":
        return f"B takes {whole['B'] / whole['F']:.2f} of F, not 2"
    both = (halves["I"] + halves["W"]) / whole["B"]
    shape = f"1 : {halves['I'] / halves['F']:.2f} : {halves['W'] / halves['F']:.2f}"
    return (
        f"I + W takes {both:.2f} of B, F {halves['F'] / whole['F']:.2f} of 1f1b's F, and in a tick the shorter of "
        f"F : I : W = {shape} waits for the longest"
    )
