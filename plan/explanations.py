"""Explain a ranking of plans: one sentence per plan on what it wins or loses by. Read `training_search.py` next."""

from collections.abc import Sequence
from dataclasses import replace

from .plan import Plan, name_layout

_GB = 1e9


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
    part, saved = _largest(second.costs, first.costs)
    share = _how_much(second, first, objective).replace("slower", "faster")
    return f"{share} than {name_layout(second.layout)}, most of it in {part} ({_s(saved)} less)."


def _explain_other(plan: Plan, first: Plan, objective: str) -> str:
    if objective == "memory":
        more = {name: size - first.memory.classes[name] for name, size in plan.memory.classes.items()}
        part = max(more, key=lambda name: more[name])
        return f"{(plan.memory.total - first.memory.total) / _GB:.1f} GB more a device, most of it {part}."
    if objective == "balanced":
        return f"{_both(plan)}: farther from the best of both."
    part, lost = _largest(plan.costs, first.costs)
    if lost <= 0:
        return f"{_how_much(plan, first, objective)}; the two spend their time alike."
    return f"{_how_much(plan, first, objective)}: {_s(lost)} more on {part}."


def _both(plan: Plan) -> str:
    assert plan.inference is not None
    return f"{_s(plan.inference.latency_s)} for one request alone, {plan.tokens_per_s:,.0f} tokens/s when full"


def _largest(costs: dict[str, float], base: dict[str, float]) -> tuple[str, float]:
    lost = {name: value - base.get(name, 0.0) for name, value in costs.items()}
    name = max(lost, key=lambda part: lost[part])
    return name, lost[name]


def _how_much(slower: Plan, faster: Plan, objective: str) -> str:
    if objective in ("train", "throughput"):
        share = faster.tokens_per_s / slower.tokens_per_s - 1
    else:
        assert slower.inference is not None
        assert faster.inference is not None
        share = slower.inference.latency_s / faster.inference.latency_s - 1
    return f"{share:.1%} slower"


def _s(time_s: float) -> str:
    return f"{time_s:.2f} s" if time_s >= 0.1 else f"{1e3 * time_s:.2f} ms"
