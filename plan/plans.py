"""A plan: a layout with its price, and in one sentence why it stands where it stands. Read `search.py` next."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..layers import ModelConfig
from ..meshes.notebook import table_html
from ..pipeline.schedules import Vocab
from .costs.inference_time import InferenceTime
from .costs.layouts import Layout
from .costs.memory_model import MemoryUse
from .costs.minimum import StepSizes, minimum_bytes
from .costs.stage_time import stage_layers
from .costs.step_time import StepTime

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, its time, its fullest device's memory, the bytes that its busiest device sends by axis, and why.

    Of training plans `step` is set, of inference plans `inference`; `costs` are seconds by what they are spent on.
    """

    layout: Layout
    memory: MemoryUse
    traffic_bytes: dict[str, float]
    costs: dict[str, float]
    step: StepTime | None = None
    inference: InferenceTime | None = None
    mfu: float = 0.0
    bubble_fraction: float = 0.0
    why: str = ""

    @property
    def time_s(self) -> float:
        """Seconds of a training step, or of one decoded token."""
        if self.step is not None:
            return self.step.time_s
        assert self.inference is not None
        return self.inference.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all devices together."""
        timing = self.step or self.inference
        assert timing is not None
        return timing.tokens_per_s

    @property
    def numbers(self) -> dict[str, Any]:
        """The plan for scripts: plain numbers and texts."""
        layout = self.layout
        found: dict[str, Any] = {
            "mesh": {"data": layout.data, "tensor": layout.tensor, "pipe": layout.pipe},
            "schedule": layout.schedule if layout.pipe > 1 else "none",
            "chunks": layout.chunks,
            "microbatches": layout.microbatches,
            "remat": layout.remat,
            "zero": layout.zero,
            "step_time_s": self.time_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "memory_bytes": {**self.memory.classes, "total": round(self.memory.total)},
            "bubble_fraction": self.bubble_fraction,
            "traffic_bytes": self.traffic_bytes,
            "why": self.why,
        }
        if self.inference is not None:
            found |= {"latency_s": self.inference.latency_s, "prefill_s": self.inference.prefill_s}
        return found

    def _repr_html_(self) -> str:
        """Return the plan as a table of two columns in HTML, which a notebook shows."""
        layout = self.layout
        rows = [
            ("mesh", name_layout(layout)),
            ("schedule", f"{layout.schedule}, {layout.microbatches} microbatches" if layout.pipe > 1 else "none"),
            ("remat", layout.remat),
            ("zero", str(layout.zero)),
            ("time of a step" if self.step is not None else "time of a token", f"{self.time_s:.4g} s"),
            ("tokens per second", f"{self.tokens_per_s:,.0f}"),
            ("MFU", f"{self.mfu:.1%}"),
            ("bubble", f"{self.bubble_fraction:.1%}"),
            ("memory per device", f"{self.memory.total / 1e9:.1f} GB"),
            ("why", self.why),
        ]
        return table_html([("plan", ""), *rows], left=2)


def step_traffic(model: ModelConfig, *, layout: Layout, num_tokens: int, vocab: Vocab) -> dict[str, float]:
    """Return the bytes that the busiest device sends in a training step, by mesh axes."""
    sizes = StepSizes(
        model=model,
        mesh=layout.mesh,
        num_microbatches=layout.microbatches,
        num_sequences=layout.sequences,
        num_tokens=num_tokens,
        num_chunks=layout.chunks,
        layers_per_stage=stage_layers(model, layout),
        vocab=vocab,
    )
    return minimum_bytes(sizes)


def step_costs(step: StepTime) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on; they add up to the step."""
    bubble = step.bubble_fraction * step.pipeline_s
    return {
        "computation": step.pipeline_s - bubble - step.tensor_s,
        "the tensor axis": step.tensor_s,
        "the bubble": bubble,
        "the data axis": step.data_s,
        "the optimizer": step.optimizer_s,
    }


def explain_plans(plans: Sequence[Plan], *, objective: str) -> list[Plan]:
    """Return the plans with a sentence each: what the first wins by, and where every other loses to it."""
    if not plans:
        return []
    first, rest = plans[0], plans[1:]
    explained = [replace(first, why=_praise(first, rest[0] if rest else None, objective))]
    return explained + [replace(plan, why=_blame(plan, first, objective)) for plan in rest]


def name_layout(layout: Layout) -> str:
    """Return a layout's axes of more than one device in few words."""
    sizes = [f"{name}={size}" for name, size in layout.mesh.sizes.items() if size > 1]
    return " ".join(sizes) or "one device"


def _praise(first: Plan, second: Plan | None, objective: str) -> str:
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


def _blame(plan: Plan, first: Plan, objective: str) -> str:
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
