"""Define a plan: a layout with its predicted time, memory and traffic. Read `training_search.py` next."""

from dataclasses import dataclass
from typing import Any

from ..layers import ModelConfig
from ..meshes.notebook import table_html
from .costs.inference_time import InferenceTime
from .costs.layout import Layout
from .costs.memory_model import MemoryUse
from .costs.minimum_traffic import StepSizes, minimum_bytes
from .costs.pipeline_time import find_placement
from .costs.runtime import Runtime
from .costs.stage_time import stage_layers
from .costs.step_time import StepTime


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout with its predictions: time, memory of the fullest device, and traffic of the busiest device by axes.

    A training plan has `step`, an inference plan `inference`. `costs` are seconds by purpose; `device_watts` is the
    power limit of a device, 0 if none is stated; `why` is one sentence on the plan's rank in a search.
    """

    layout: Layout
    memory: MemoryUse
    traffic_bytes: dict[str, float]
    costs: dict[str, float]
    step: StepTime | None = None
    inference: InferenceTime | None = None
    mfu: float = 0.0
    bubble_fraction: float = 0.0
    device_watts: float = 0.0
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
    def gpu_hours(self) -> float:
        """Hours of one device for a billion tokens."""
        return self.layout.num_devices * 1e9 / self.tokens_per_s / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Kilowatt-hours of all devices at their power limit for a billion tokens; None if no limit is stated."""
        return self.gpu_hours * self.device_watts / 1000 if self.device_watts else None

    @property
    def numbers(self) -> dict[str, Any]:
        """The plan as a dictionary of plain numbers and texts, for JSON."""
        layout = self.layout
        found: dict[str, Any] = {
            "mesh": layout.mesh.sizes,
            **({"context_attention": layout.context_attention} if layout.context > 1 else {}),
            "schedule": layout.schedule if layout.pipe > 1 else "none",
            "chunks": layout.chunks,
            "microbatches": layout.microbatches,
            "remat": layout.remat,
            "zero": layout.zero,
            "shard": layout.shard,
            "offload": layout.offload,
            "step_time_s": self.time_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "gpu_hours_per_billion_tokens": self.gpu_hours,
            "kwh_per_billion_tokens": self.energy_kwh,
            "memory_bytes": {**self.memory.classes, "total": round(self.memory.total)},
            "host_bytes": round(self.memory.host),
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
            ("shard", layout.shard),
            ("offload", layout.offload),
            ("time of a step" if self.step is not None else "time of a token", f"{self.time_s:.4g} s"),
            ("tokens per second", f"{self.tokens_per_s:,.0f}"),
            ("MFU", f"{self.mfu:.1%}"),
            ("bubble", f"{self.bubble_fraction:.1%}"),
            ("memory per device", f"{self.memory.total / 1e9:.1f} GB"),
            ("why", self.why),
        ]
        return table_html([("plan", ""), *rows], left=2)


def step_traffic(model: ModelConfig, *, layout: Layout, num_tokens: int, runtime: Runtime) -> dict[str, float]:
    """Return the minimum bytes that the busiest device sends in a training step, by mesh axes."""
    sizes = StepSizes(
        model=model,
        mesh=layout.mesh,
        num_microbatches=layout.microbatches,
        num_sequences=layout.sequences,
        num_tokens=num_tokens,
        num_chunks=layout.chunks,
        layers_per_stage=stage_layers(model, layout, runtime=runtime),
        vocab=runtime.vocab,
        context_attention=layout.way_to_attend(model),
        placement=find_placement(model, layout=layout, num_tokens=num_tokens, runtime=runtime),
    )
    return minimum_bytes(sizes)


def step_costs(step: StepTime) -> dict[str, float]:
    """Return the seconds of a step by purpose; they add up to the step."""
    bubble = step.bubble_fraction * step.pipeline_s
    return {
        "computation": step.pipeline_s - bubble - step.tensor_s,
        "the tensor axis": step.tensor_s,
        "the bubble": bubble,
        "the data axis": step.data_s,
        "the optimizer": step.optimizer_s,
        "copies of residuals": step.host_s,
    }


def name_layout(layout: Layout) -> str:
    """Return the axes of a layout with more than one device, as text such as `data=2 pipe=4`."""
    sizes = [f"{name}={size}" for name, size in layout.mesh.sizes.items() if size > 1]
    return " ".join(sizes) or "one device"
