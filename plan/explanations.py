"""Explain a ranking of plans: one sentence per plan on what it wins or loses by. Read `training_search.py` next."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from .plan import Plan, name_layout

_GB = 1e9

ON_FRONT = "no other plan is as good in all of them."
"""The reason of a plan that is best in none of several objectives, and beaten by none in all."""


def explain_plans(plans: Sequence[Plan], *, objective: str) -> list[Plan]:
    """Return the plans with `why` set: what the first wins by, and what every other loses by."""
    if not plans:
        return []
    first, rest = plans[0], plans[1:]
    explained = [replace(first, why=_explain_first(first, rest[0] if rest else None, objective))]
    return explained + [replace(plan, why=_explain_other(plan, first, objective)) for plan in rest]


def _explain_first(first: Plan, second: Plan | None, objective: str) -> str:
    if second is None:
        return "the only mesh that fits."
    if objective == "balanced":
        return f"{_both(first)}: nearest to the best of both."
    if objective == "memory":
        saved = (second.memory.total - first.memory.total) / _GB
        return f"least memory: {saved:.1f} GB a device below the next."
    if objective in ("gpu-hours", "energy"):
        fewer = second.gpu_hours / first.gpu_hours - 1
        return f"{first.gpu_hours:,.1f} hours of one device for a billion tokens: the next takes {fewer:.1%} more."
    part, saved = _largest_loss(second.costs, first.costs)
    lead = _lead(second, first, objective)
    return f"{lead:.1%} faster than {name_layout(second.layout)}, most of it in {part} ({_format_s(saved)} less)."


def _explain_other(plan: Plan, first: Plan, objective: str) -> str:
    if objective == "memory":
        more = {name: size - first.memory.classes[name] for name, size in plan.memory.classes.items()}
        part = max(more, key=lambda name: more[name])
        return f"{(plan.memory.total - first.memory.total) / _GB:.1f} GB more a device, most of it {part}."
    if objective == "balanced":
        return f"{_both(plan)}: farther from the best of both."
    if objective in ("gpu-hours", "energy"):
        return f"{plan.gpu_hours:,.1f} hours of one device for a billion tokens: {_share_more(plan, first)} more."
    part, lost = _largest_loss(plan.costs, first.costs)
    slower = f"{_lead(plan, first, objective):.1%} slower"
    return f"{slower}: {_format_s(lost)} more on {part}." if lost > 0 else f"{slower}; the two spend their time alike."


def explain_front(plans: Sequence[Plan], *, objectives: Sequence[str]) -> list[Plan]:
    """Return plans that are beaten by none in all objectives, with `why` saying in which of them each is best."""
    values: dict[str, Callable[[Plan], float]] = {
        "train": lambda plan: plan.time_s,
        "memory": lambda plan: plan.memory.total,
        "gpu-hours": lambda plan: plan.gpu_hours,
        "energy": lambda plan: plan.gpu_hours,
    }
    names = {"train": "time", "memory": "memory", "gpu-hours": "device hours", "energy": "energy"}
    explained = []
    for plan in plans:
        best = [names[one] for one in objectives if values[one](plan) == min(map(values[one], plans))]
        why = f"least {' and '.join(best)}." if best else ON_FRONT
        explained.append(replace(plan, why=why))
    return explained


def _share_more(plan: Plan, first: Plan) -> str:
    return f"{plan.gpu_hours / first.gpu_hours - 1:.1%}"


def _both(plan: Plan) -> str:
    """Return the latency of one request and the throughput of a full machine in words."""
    assert plan.inference is not None
    return f"{_format_s(plan.inference.latency_s)} for one request alone, {plan.tokens_per_s:,.0f} tokens/s when full"


def _largest_loss(costs: dict[str, float], base: dict[str, float]) -> tuple[str, float]:
    """Return the purpose on which a plan spends most seconds more than the base, and these seconds."""
    lost = {name: value - base.get(name, 0.0) for name, value in costs.items()}
    name = max(lost, key=lambda part: lost[part])
    return name, lost[name]


def _lead(slower: Plan, faster: Plan, objective: str) -> float:
    """Return the relative difference of two plans in throughput, or in latency."""
    if objective in ("train", "throughput"):
        return faster.tokens_per_s / slower.tokens_per_s - 1
    assert slower.inference is not None
    assert faster.inference is not None
    return slower.inference.latency_s / faster.inference.latency_s - 1


def _format_s(time_s: float) -> str:
    """Return a time in seconds, or in milliseconds below 0.1 s."""
    return f"{time_s:.2f} s" if time_s >= 0.1 else f"{1e3 * time_s:.2f} ms"
