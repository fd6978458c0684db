"""Write a simulated schedule as a Chrome trace: one thread per rank, one slice per action.

Perfetto and chrome://tracing open such files.
"""

import json
from collections.abc import Sequence

from .schedule import Schedule
from .simulate import Clock, time_actions
from .stage_cost import StageCost

_MICROSECONDS = 1000
_COLOURS = {"F": "thread_state_iowait", "B": "thread_state_running", "I": "rail_response", "W": "rail_animation"}
_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def trace_from_schedule(
    schedule: Schedule, *, clock: Clock = "lockstep", stages: Sequence[StageCost] | None = None, **costs: float
) -> str:
    """Return the trace as JSON; one unit of cost lasts a millisecond.

    >>> Path("gpipe.json").write_text(trace_from_schedule(schedule, clock="async", forward=0.8))

    Args:
        stages, costs: as in `simulate`; costs are forward, input_grad, weight_grad and transfer.

    Raises:
        ScheduleError: as `simulate`.
    """
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{schedule.name} ({clock})"}}
    ]
    for rank in range(schedule.num_ranks):
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
    for span in time_actions(schedule, clock=clock, stages=stages, **costs):
        action = span.action
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": span.rank,
                "name": str(action),
                "cat": _NAMES[action.kind],
                "cname": _COLOURS[action.kind],
                "ts": span.start * _MICROSECONDS,
                "dur": (span.end - span.start) * _MICROSECONDS,
                "args": {"stage": action.stage, "kind": _NAMES[action.kind], "microbatch": action.microbatch},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
