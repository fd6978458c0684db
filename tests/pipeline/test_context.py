"""Context parallelism equals one device; packed documents equal each document by itself."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from trellax.layers import ModelConfig, Remat
from trellax.layers.context.choice import Way

from .law import OnOff, answer_of, beyond, broken, errors_of, pipeline_step, small_model
from .packed import attended_one_by_one, documents_one_by_one, packed_batch

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 32,
    "balance_loss": 0.1,
    "router_z_loss": 0.01,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    mesh: str
    schedule: str = "1f1b"
    num_microbatches: int = 3
    style: str = "llama"
    attention: Literal["mha", "gqa", "mqa"] = "gqa"
    window: int = 0
    experts: OnOff = "off"
    packed: OnOff = "off"
    sequence: OnOff = "off"
    shard: Literal["none", "step", "chunk", "layer"] = "none"
    vocab: Literal["ends", "split"] = "ends"
    remat: Remat = "none"
    num_chunks: int = 1
    context: Way = "gather"

    def __str__(self) -> str:
        flags = (("window", self.window), ("experts", self.experts == "on"), ("packed", self.packed == "on"))
        more = [
            name
            for name, is_on in (*flags, ("sequence", self.sequence == "on"), ("ulysses", self.context == "ulysses"))
            if is_on
        ]
        more += ["once"] * (self.context == "gather-once")
        text = "-".join(
            (self.mesh, self.schedule, self.style, self.attention, *more, self.shard, self.vocab, self.remat)
        )
        return text.replace(",", "-")

    @property
    def model(self) -> ModelConfig:
        own = replace(small_model(style=self.style, attention=self.attention), attention_window=self.window)
        return replace(own, **EXPERTS) if self.experts == "on" else own


CASES = (
    Case(mesh="context=2,pipe=2", style="gpt", attention="mha"),
    Case(mesh="context=4,pipe=2", schedule="zb-h1", window=5, packed="on", remat="dots"),
    Case(mesh="context=2,tensor=2,pipe=2", sequence="on", vocab="split", packed="on", remat="dots"),
    Case(mesh="data=2,context=2,pipe=2", schedule="zb-h1", shard="layer", window=3),
    Case(mesh="context=4,pipe=2", window=3, packed="on", context="ulysses", remat="dots"),
)

MORE_CASES = (
    Case(mesh="context=4"),
    Case(mesh="context=8", attention="mha", context="ulysses"),
    Case(mesh="context=2,tensor=2,pipe=2", context="ulysses", sequence="on", schedule="zb-h1"),
    Case(mesh="data=2,context=2,pipe=2", context="ulysses", style="gpt", attention="mha", shard="step", packed="on"),
    Case(mesh="context=2,pipe=2", context="ulysses", schedule="zb-v", num_chunks=2, window=5, remat="full"),
    Case(mesh="context=8", num_microbatches=1, style="gpt"),
    Case(mesh="context=8", packed="on", window=7, attention="mqa", remat="full"),
    Case(mesh="context=2,tensor=4", sequence="on", attention="mqa"),
    Case(mesh="context=2,tensor=2,pipe=2", attention="mha", style="gpt", packed="on"),
    Case(mesh="context=2,tensor=2,pipe=2", schedule="zb-h1", sequence="on", remat="full"),
    Case(mesh="context=2,pipe=4", schedule="zb-h1", remat="dots"),
    Case(mesh="context=2,pipe=2", schedule="interleaved-1f1b", num_chunks=2, packed="on"),
    Case(mesh="context=4,pipe=2", schedule="interleaved-zb-h1", num_chunks=2, window=6, vocab="split"),
    Case(mesh="context=2,pipe=2", schedule="zb-v", num_chunks=2, packed="on", vocab="split"),
    Case(mesh="context=2,tensor=2,pipe=2", schedule="zb-v", num_chunks=2, sequence="on"),
    Case(mesh="data=2,context=2,tensor=2", shard="step", sequence="on", packed="on"),
    Case(mesh="data=2,context=2,pipe=2", shard="step", vocab="split"),
    Case(mesh="data=2,context=2,pipe=2", shard="layer", packed="on", schedule="interleaved-1f1b", num_chunks=2),
    Case(mesh="context=4,pipe=2", shard="layer", remat="full"),
    Case(mesh="context=4,pipe=2", shard="chunk", packed="on", schedule="interleaved-1f1b", num_chunks=2),
    Case(mesh="context=2,expert=2,pipe=2", experts="on", shard="chunk", schedule="zb-v", num_chunks=2),
    Case(mesh="context=2,tensor=2,pipe=2", context="gather-once", remat="dots", sequence="on", packed="on"),
    Case(mesh="context=4,pipe=2", context="gather-once", schedule="zb-h1", style="qwen"),
    Case(mesh="context=2,pipe=2", context="gather-once", schedule="zb-v", num_chunks=2, window=3, remat="full"),
    Case(mesh="data=2,context=2,expert=2", context="gather-once", experts="on", shard="layer", remat="dots"),
    Case(mesh="context=2,pipe=2", experts="on"),
    Case(mesh="context=2,expert=2,pipe=2", experts="on", schedule="zb-h1"),
    Case(mesh="context=2,expert=2,tensor=2", experts="on", sequence="on"),
    Case(mesh="context=4,expert=2", experts="on", window=4),
    Case(mesh="cp=2:context,dp=2:batch,pp=2:pipe", style="qwen"),
    *(Case(mesh="context=2,pipe=2", window=window, packed="on") for window in (1, 2, 4, 5, 8, 9, 16, 40)),
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_context_parallel_equals_one_device(case: Case) -> None:
    assert found_in(case) == {}


@pytest.mark.parametrize("mesh", ["data=2,pipe=2", pytest.param("tensor=2,pipe=2", marks=pytest.mark.slow)])
def test_packed_documents_equal_each_by_itself(mesh: str) -> None:
    assert found_in(Case(mesh=mesh, style="gpt", packed="on")) == {}


def found_in(case: Case) -> dict[str, float]:
    """Return where the step of a case differs from its reference."""
    num_sequences = 4 * case.num_microbatches
    step: dict[str, Any] = {
        "mesh": case.mesh,
        "schedule": case.schedule,
        "num_microbatches": case.num_microbatches,
        "num_sequences": num_sequences,
        "num_chunks": case.num_chunks,
        "sequence": case.sequence,
        "shard": case.shard,
        "vocab": case.vocab,
        "remat": case.remat,
        "context": case.context,
        "bubbles": "nan",
    }
    if case.packed == "off":
        return broken(case.model, tolerance=TOLERANCE, **step)
    actual = answer_of(pipeline_step(case.model, batch=packed_batch(num_sequences), **step))
    reference = attended_one_by_one if case.experts == "on" else documents_one_by_one
    return beyond(errors_of(actual, reference(case.model, num_sequences)), tolerance=TOLERANCE)
