"""Attribute executed instructions to the actions of a schedule, and measure how long actions take.

The executor names a scope for each action, and these names survive in the compiled program. Fake devices share the
cores, so the duration of an event is that of its work only while no other rank works. So actions are timed with
schedules in which one rank acts at a time: `naive` for whole backwards and `naive_halves` for split ones.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

from trellax.programs.collectives import KINDS
from trellax.programs.hlo import HloModule, Instruction
from trellax.schedules import Action, Schedule, build_schedule

from benchmarks.workers.traces import Execution, list_traced

ONCE, UNKNOWN = "once a step", "unknown"
"""Scopes of instructions outside the loop over ticks, and of those inside it that belong to no action."""

MAX_SHARE = 0.1
"""The largest share of the loop's time that may belong to no action, or in which several ranks may work at once."""

_ACTIONS = {"forward", "backward", "input_grad", "weight_grad"}
_NAMES = _ACTIONS | {"first", "last", "first_back", "exchange"}
_CONTROL = {"conditional", "while", "call"}


def naive_halves(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Return `naive` with split backwards; a weight gradient waits for the tick of the next input gradient.

    In that tick it comes first. A rank waits for another one only to receive, and nobody receives a weight gradient:
    at the end of its tick, or in its own tick, it would run at the same time as the next rank's input gradient. Those
    of the last microbatch do.
    """
    naive = build_schedule("naive", num_ranks=num_ranks, num_microbatches=num_microbatches)
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for tick, rank, action in naive.placed():
        cell, k = ticks_of[rank].setdefault(tick, []), action.microbatch
        if action.kind == "F":
            cell.append(action)
            continue
        if k:
            cell.append(Action(stage=rank, kind="W", microbatch=k - 1))
        cell.append(Action(stage=rank, kind="I", microbatch=k))
    for rank, ticks in enumerate(ticks_of):
        ticks[naive.num_ticks + rank] = [Action(stage=rank, kind="W", microbatch=num_microbatches - 1)]
    return Schedule.from_ticks(ticks_of, name="naive-halves", num_microbatches=num_microbatches)


def time_scopes(steps: Mapping[str, tuple[Any, Any]], *, rounds: int) -> dict[str, Any]:
    """Trace steps of several programs in turns; return the median seconds of an action by program, scope and rank.

    Args:
        steps: name -> compiled program and its arguments, warmed up; device r of the mesh is rank r.

    Raises:
        RuntimeError: more than a tenth of the loop's time belongs to no action, or two ranks work at once for longer.
    """
    scopes = {name: scopes_of(HloModule.parse(compiled.as_text())) for name, (compiled, _) in steps.items()}
    traces: dict[str, list[list[Execution]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (compiled, inputs) in steps.items():
            traces[name].append(list_traced(lambda c=compiled, i=inputs: c(*i), scopes[name]))
    return {name: _summarize(name, own, scopes[name]) for name, own in traces.items()}


def scopes_of(program: HloModule) -> dict[str, str]:
    """Return the scope of every instruction that computes, which excludes collectives and control flow.

    An instruction without a scope in its name gets that of most instructions of its computation, or else that of the
    instruction that calls the computation.
    """
    callers = {called: (at.name, i) for at, i in program.instructions() for called in _called(i)}

    @cache
    def home(computation: str) -> str:
        if computation not in callers:
            return ONCE
        names = [_named_scope(i) for i in program.computations[computation].instructions.values() if i.op_name]
        place, caller = callers[computation]
        (scope, count), *_ = Counter(names).most_common(1) or [(UNKNOWN, 0)]
        if home(place) == ONCE:
            return UNKNOWN if caller.opcode == "while" else ONCE
        if scope != UNKNOWN and 2 * count > len(names):
            return scope
        return scope_in(place, caller)

    def scope_in(computation: str, instruction: Instruction) -> str:
        named = _named_scope(instruction)
        return home(computation) if named == UNKNOWN or home(computation) == ONCE else named

    return {
        i.name: scope_in(at.name, i)
        for at, i in program.instructions()
        if i.opcode not in _CONTROL and i.opcode.removesuffix("-start").removesuffix("-done") not in KINDS
    }


def count_in_loop(program: HloModule, counts: Counter[str], opcode: str) -> int:
    """Count executions of instructions of one kind inside the loop over ticks."""
    called = {name for _, i in program.instructions() for name in _called(i)}
    return sum(counts[i.name] for at, i in program.instructions() if at.name in called and i.opcode == opcode)


def _called(instruction: Instruction) -> list[str]:
    return [name for names in instruction.called().values() for name in names]


def _named_scope(instruction: Instruction) -> str:
    """Return the scope in an instruction's own name: an action, an end of the model or both, outermost first."""
    words = [word for word in re.split(r"[/()]", instruction.op_name) if word in _NAMES]
    return "/".join(list(dict.fromkeys(words))[:2]) or UNKNOWN


def _summarize(name: str, traces: list[list[Execution]], scopes: Mapping[str, str]) -> dict[str, Any]:
    """Return median times of actions, and the shares of time that tell whether to trust them."""
    num_ranks = 1 + max(one.device for one in traces[0])
    found: dict[str, list[list[float]]] = {}
    busy = {ONCE: 0.0, UNKNOWN: 0.0, "loop": 0.0, "ranks": 0.0, "all": 0.0}
    for trace in traces:
        in_loop = [one for one in trace if scopes[one.name] != ONCE]
        at_work = [one for one in in_loop if scopes[one.name] != UNKNOWN]
        busy[ONCE] += sum(one.end_s - one.start_s for one in trace if scopes[one.name] == ONCE)
        busy[UNKNOWN] += sum(one.end_s - one.start_s for one in in_loop if scopes[one.name] == UNKNOWN)
        busy["loop"] += sum(one.end_s - one.start_s for one in in_loop)
        busy["all"] += _busy_s(at_work)
        for rank in range(num_ranks):
            own = [one for one in at_work if one.device == rank]
            busy["ranks"] += _busy_s(own)
            for action in _group_actions(own, scopes):
                for scope, executions in action.items():
                    found.setdefault(scope, [[] for _ in range(num_ranks)])[rank].append(_busy_s(executions))
    seconds = {scope: [statistics.median(own or [0.0]) for own in ranks] for scope, ranks in sorted(found.items())}
    shares = {
        "unknown_share": busy[UNKNOWN] / busy["loop"],
        "overlap_share": busy["ranks"] / busy["all"] - 1,
        "once_share": busy[ONCE] / (busy[ONCE] + busy["loop"]),
    }
    if max(shares["unknown_share"], shares["overlap_share"]) > MAX_SHARE:
        raise RuntimeError(f"{name}: too much time in no action, or of several ranks at once: {shares}")
    costliest = {kind: _find_costliest(traces, scopes, kind) for kind in {scope.split("/")[0] for scope in seconds}}
    return {"seconds": seconds, "costliest": costliest} | shares


def _find_costliest(traces: list[list[Execution]], scopes: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Return the costliest instruction of a kind of action: one slow fusion can decide a comparison."""
    total: defaultdict[str, float] = defaultdict(float)
    for trace in traces:
        for one in trace:
            if scopes[one.name].split("/")[0] == kind:
                total[one.name] += one.end_s - one.start_s
    name = max(total, key=total.__getitem__)
    return {"name": name, "share": total[name] / sum(total.values())}


def _group_actions(executions: list[Execution], scopes: Mapping[str, str]) -> list[dict[str, list[Execution]]]:
    """Group one rank's executions by action and scope; two actions of one kind never follow each other directly."""
    actions: list[dict[str, list[Execution]]] = []
    before = ""
    for one in executions:
        scope = scopes[one.name]
        kind = scope.split("/")[0]
        if kind not in _ACTIONS:
            continue
        if kind != before:
            actions.append({})
        actions[-1].setdefault(scope, []).append(one)
        before = kind
    return actions


def _busy_s(executions: list[Execution]) -> float:
    """Return the seconds in which at least one of these executions was running; they are in order of start."""
    total, until = 0.0, float("-inf")
    for one in executions:
        total += max(0.0, one.end_s - max(one.start_s, until))
        until = max(until, one.end_s)
    return total
