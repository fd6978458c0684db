"""Measure times of single actions and of whole steps, and simulate the ticks of schedules with them.

Ticks are the time by the lockstep clock of ranks that each have a device, without transfers and without work that a
step does only once. Whole steps run on fake devices that share the cores, where bubbles cost nothing: they show other
costs of a schedule, such as that of a split backward. Read `verdicts.py` next, which says where the two disagree.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from trellax.schedules import SCHEDULES, Schedule, StageCost, Timing, Vocab, build_schedule, simulate

from benchmarks.rounds import Ways, take_turns, tell
from benchmarks.workers.process import Worker

RANKS = 4
VOCABS: tuple[Vocab, ...] = ("ends", "split")
SHARES = ("unknown_share", "overlap_share", "once_share")
"""Shares of the traced time: in no action, in several ranks at once, and outside the loop over ticks."""

_KINDS = {"F": "forward", "B": "backward", "I": "input_grad", "W": "weight_grad"}


def num_chunks(schedule: str) -> int:
    """Return the number of chunks per rank in a named schedule."""
    return SCHEDULES[schedule].default_chunks


def build(schedule: str, num_microbatches: int) -> Schedule:
    """Return a named schedule on 4 ranks."""
    sizes = {"num_ranks": RANKS, "num_microbatches": num_microbatches, "num_chunks": num_chunks(schedule)}
    return build_schedule(schedule, **sizes)


def measure_actions(worker: Worker, *, num_microbatches: int, rounds: int) -> dict[str, Any]:
    """Measure the seconds of one action on all layers of a rank, with whole and with split backwards."""
    tell(f"times of actions, one rank at a time, {rounds} traced steps of each program")
    traced = worker.ask("actions", num_microbatches=num_microbatches, rounds=rounds)
    return {
        name: {
            **{share: traced[program][share] for share in SHARES},
            "costliest": {kind: traced[program]["costliest"][_KINDS[kind]] for kind in kinds},
            "seconds": {kind: _action_s(traced[program]["seconds"], _KINDS[kind]) for kind in kinds},
        }
        for name, program, kinds in (("whole", "naive", "FB"), ("halves", "naive-halves", "FIW"))
    }


def time_ticks(schedule: Schedule, actions: Mapping[str, Any]) -> Timing:
    """Simulate a schedule with measured action times, of which each of v chunks takes 1/v."""
    has_halves = any(action.kind == "I" for _, _, action in schedule.placed())
    seconds = actions["halves" if has_halves else "whole"]["seconds"]
    v = schedule.num_chunks
    cost = StageCost(
        forward=seconds["F"] / v,
        input_grad=seconds["I" if has_halves else "B"] / v,
        weight_grad=seconds["W"] / v if has_halves else 0.0,
    )
    return simulate(schedule, stages=[cost] * schedule.num_stages)


def measure_times(worker: Worker, schedules: tuple[str, ...], *, m: int, rounds: int, actions: Any) -> list[Any]:
    """Return unit-cost ticks, ticks by measured times and step times of each schedule, and their ratios to 1F1B."""
    steps = _time_rounds(
        {name: lambda n=name: worker.ask("step", schedule=n, num_microbatches=m) for name in schedules},
        rounds=rounds,
        what=f"steps, m={m}",
    )
    rows: list[dict[str, Any]] = []
    for name in schedules:
        schedule = build(name, m)
        unit, ticks = simulate(schedule), time_ticks(schedule, actions)
        has_halves = any(action.kind == "I" for _, _, action in schedule.placed())
        row: dict[str, Any] = {"schedule": name, "num_microbatches": m, "backward": "halves" if has_halves else "whole"}
        row |= {"unit": unit.makespan, "unit_busy": 1 - unit.bubble_fraction}
        rows.append(row | {"ticks_s": ticks.makespan, "ticks_busy": 1 - ticks.bubble_fraction} | steps[name])
    (base,) = (row for row in rows if row["schedule"] == "1f1b")
    keys = {"unit": "unit", "ticks": "ticks_s", "wall": "wall_s", "wall_min": "wall_s_min", "cpu": "cpu_s"}
    return [row | {f"{ratio}_ratio": row[key] / base[key] for ratio, key in keys.items()} for row in rows]


def measure_vocabulary(worker: Worker, *, m: int, rounds: int, traces: int) -> dict[str, Any]:
    """Measure a large vocabulary on the end stages and split over all ranks, with 1F1B."""
    tell("vocabulary: memory and collectives")
    rows: dict[str, dict[str, Any]] = {v: worker.ask("memory", vocab=v, num_microbatches=m) for v in VOCABS}
    for vocab, row in rows.items():
        row["all_reduces"] = worker.ask("all_reduces", vocab=vocab, num_microbatches=m)
    steps = _time_rounds(
        {vocab: lambda v=vocab: worker.ask("step", vocab=v, num_microbatches=m) for vocab in VOCABS},
        rounds=rounds,
        what=f"vocabulary: steps, m={m}",
    )
    tell(f"vocabulary: times of actions, one rank at a time, {traces} traced steps")
    traced = worker.ask("actions", num_microbatches=m, rounds=traces)
    times = _time_vocabulary(traced["seconds"], m)
    rows = {vocab: row | steps[vocab] | times["ticks"][vocab] for vocab, row in rows.items()}
    return {"num_microbatches": m, "rows": rows} | {share: traced[share] for share in SHARES} | times["means"]


def _action_s(seconds: Mapping[str, list[float]], action: str) -> float:
    """Return the mean over ranks of the seconds of one action, including the model's ends inside it."""
    return sum(sum(own) for scope, own in seconds.items() if scope.split("/")[0] == action) / RANKS


def _time_rounds(ways: Ways, *, rounds: int, what: str) -> dict[str, dict[str, float]]:
    """Measure all ways in turns; return the median of each clock and the least wall seconds of every way."""
    seconds = take_turns(ways, rounds=rounds, what=what, warm_up="first round")
    return {
        name: {clock: statistics.median(one[clock] for one in own) for clock in ("wall_s", "cpu_s")}
        | {"wall_s_min": min(one["wall_s"] for one in own)}
        for name, own in seconds.items()
    }


def _time_vocabulary(seconds: Mapping[str, list[float]], m: int) -> dict[str, Any]:
    """Simulate 1F1B for both places of the vocabulary; a split one divides head and embedding evenly over ranks."""
    scopes = ("forward", "forward/first", "forward/last", "backward", "backward/first_back")
    ranks = list(zip(*(seconds.get(scope, [0.0] * RANKS) for scope in scopes), strict=True))
    layers = [StageCost(forward=f, input_grad=b, weight_grad=0.0) for f, _, _, b, _ in ranks]
    whole = [
        StageCost(forward=f + first + last, input_grad=b + back, weight_grad=0.0) for f, first, last, b, back in ranks
    ]
    head_s, embedding_s = sum(rank[2] for rank in ranks), sum(rank[1] + rank[4] for rank in ranks)
    costs = {"ends": (whole, 0.0), "split": (layers, (head_s + embedding_s) / RANKS)}
    ticks = {}
    for vocab in VOCABS:
        stages, shared = costs[vocab]
        schedule = build_schedule("1f1b", num_ranks=RANKS, num_microbatches=m, vocab=vocab)
        timing = simulate(schedule, stages=stages, shared_loss=shared)
        mean = sum(timing.busy) / RANKS
        ticks[vocab] = {"ticks_s": timing.makespan, "ticks_busy": 1 - timing.bubble_fraction}
        ticks[vocab] |= {"last_over_mean": timing.busy[-1] / mean}
    layers_s = sum(cost.total for cost in layers) / RANKS
    return {"ticks": ticks, "means": {"head_s": head_s, "embedding_s": embedding_s, "layers_of_a_stage_s": layers_s}}
