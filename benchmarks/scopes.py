"""Which action of a schedule every executed instruction belongs to, and how long actions take.

The executor names the scope of each action, and names survive in the compiled program. Fake devices share the cores, so
an event lasts as long as its work only while no other rank works: time schedules in which one rank acts at a time,
`naive` for whole backwards and `naive_halves` for halves.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from hlo import Instruction, Program, parse_program, time_executions
from trellax.pipeline import Action, Schedule, build_schedule

ONCE, UNKNOWN = "once a step", "unknown"
"""Scopes of what runs outside the loop over turns, and of what in it belongs to no action."""

MAX_UNKNOWN = 0.1
"""The largest share of the loop's time that may belong to no action."""

_NAMES = {"forward", "backward", "input_grad", "weight_grad", "first", "last", "first_back", "exchange"}
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONTROL = {"conditional", "while", "call"}
_COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective|reduce-scatter")

Seconds = dict[str, list[float]]
"""Scope -> seconds in one step on each rank. An end inside an action is `forward/last`."""


def naive_halves(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Return `naive` with its backwards in halves, both in one tick.

    A rank waits for another only at the end of a tick in which something is sent: with a tick of its own, a weight
    gradient would run beside the next rank's input gradient.
    """
    naive = build_schedule("naive", num_ranks=num_ranks, num_microbatches=num_microbatches)
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for tick, rank, action in naive.placed():
        for kind in ("I", "W") if action.kind == "B" else ("F",):
            half = Action(stage=action.stage, kind=kind, microbatch=action.microbatch)
            ticks_of[rank].setdefault(tick, []).append(half)
    return Schedule.from_ticks(ticks_of, name="naive-halves", num_microbatches=num_microbatches)


def time_scopes(steps: Mapping[str, tuple[Any, Any]], *, rounds: int) -> dict[str, Any]:
    """Trace steps of several programs in turns; return for each the median seconds by scope and rank.

    Args:
        steps: name -> compiled program and its arguments, warmed up; device r of the mesh is rank r.

    Raises:
        RuntimeError: more than a tenth of the loop's time belongs to no action.
    """
    scopes = {name: scopes_of(parse_program(compiled.as_text())) for name, (compiled, _) in steps.items()}
    rounds_of: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (compiled, inputs) in steps.items():
            rounds_of[name].append(_time_step(lambda c=compiled, i=inputs: c(*i), scopes[name]))
    return {name: _summarize(name, own) for name, own in rounds_of.items()}


def scopes_of(program: Program) -> dict[str, str]:
    """Return the scope of every instruction that does work: no collective, and none that only runs others.

    One without a name of its own belongs where most of its computation does, or else to what runs that computation.
    """
    callers = {called: (name, i) for name, own in program.items() for i in own.values() for called in _called(i)}

    @cache
    def home(computation: str) -> str:
        if computation not in callers:
            return ONCE
        names = [_named_scope(i) for i in program[computation].values() if "op_name=" in i.rest]
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
        i.name: scope_in(name, i)
        for name, own in program.items()
        for i in own.values()
        if i.opcode not in _CONTROL and not _COLLECTIVE.search(i.opcode)
    }


def count_in_loop(program: Program, counts: Counter[str], opcode: str) -> int:
    """Return how often instructions of one kind ran inside the loop over turns."""
    called = {name for own in program.values() for i in own.values() for name in _called(i)}
    return sum(
        counts[i.name] for name, own in program.items() if name in called for i in own.values() if i.opcode == opcode
    )


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    listed = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return [*_CALLED.findall(instruction.rest), *listed]


def _named_scope(instruction: Instruction) -> str:
    """The scope in an instruction's own name: an action, an end or both, outermost first."""
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    words = [word for word in re.split(r"[/()]", match[1]) if word in _NAMES] if match else []
    return "/".join(list(dict.fromkeys(words))[:2]) or UNKNOWN


def _time_step(run: Callable[[], Any], scopes: Mapping[str, str]) -> Seconds:
    durations = time_executions(run, scopes)
    devices = sorted({device for device, _ in durations})
    seconds: Seconds = {}
    for (device, name), nanoseconds in durations.items():
        own = seconds.setdefault(scopes[name], [0.0] * len(devices))
        own[devices.index(device)] += nanoseconds * 1e-9
    return seconds


def _summarize(name: str, rounds: list[Seconds]) -> dict[str, Any]:
    """Medians over rounds by scope and rank, and the share of the loop's time that belongs to no action."""
    scopes = sorted({scope for own in rounds for scope in own})
    num_ranks = max(len(own) for own in rounds[0].values())
    seconds = {
        scope: [
            statistics.median(own.get(scope, [0.0] * num_ranks)[rank] for own in rounds) for rank in range(num_ranks)
        ]
        for scope in scopes
    }
    loop_s = sum(sum(own) for scope, own in seconds.items() if scope != ONCE)
    once_s, unknown_s = (sum(seconds.pop(scope, [0.0])) for scope in (ONCE, UNKNOWN))
    share = unknown_s / loop_s
    if share > MAX_UNKNOWN:
        raise RuntimeError(f"{share:.1%} of the loop's time in {name} belongs to no action")
    return {"seconds": seconds, "unknown_share": share, "once_s": once_s, "loop_s": loop_s}
