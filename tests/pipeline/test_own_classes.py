"""Blocks, feed-forwards, norms and attention of the user's equal one device on every mesh and schedule."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import pytest
from trellax.layers import ModelConfig

from . import own_blocks
from .law import answer_of, beyond, broken, errors_of, pipeline_step, small_model

# float32: sums of other orders, as for our own blocks.
TOLERANCE = 2e-5

MODELS: dict[str, dict[str, Any]] = {
    "block": {"block": "ParallelBlock", "dims": ("inner=tensor",)},
    "mlp": {"mlp_class": "ByHand", "dims": ("inner=tensor",)},
    "whole": {"mlp_class": "ByHand", "dims": ("inner=none",)},
    "norm": {"norm_class": "ScaleNorm"},
    "norm without parameters": {"norm_class": "FreeNorm"},
    "attention": {"attention_class": "WindowAttention"},
    "all": {"mlp_class": "ByHand", "norm_class": "ScaleNorm", "attention_class": "WindowAttention"}
    | {"dims": ("inner=tensor",)},
}


def own_model(name: str, **more: Any) -> ModelConfig:
    own: dict[str, Any] = {
        key: value if key == "dims" else f"{own_blocks.__name__}:{value}"
        for key, value in (MODELS[name] | more).items()
    }
    return replace(small_model(style="llama", attention="gqa"), **own)


@dataclass(frozen=True)
class Case:
    model: str
    mesh: str
    schedule: str
    microbatches: int = 2
    sequence: Literal["on", "off"] = "off"
    shard: Literal["none", "step", "layer"] = "none"
    vocab: Literal["ends", "split"] = "ends"

    def __str__(self) -> str:
        return f"{self.model}-{self.mesh}-{self.schedule}-{self.sequence}-{self.shard}-{self.vocab}"


CASES = (
    Case("all", "2x2x2", "1f1b"),
    Case("block", "1x1x1", "1f1b"),
    Case("block", "2x2x2", "zb-h1", 3, vocab="split"),
    Case("block", "2x4x1", "gpipe", sequence="on"),
    Case("block", "2x1x4", "zb-v", 4),
    Case("block", "data=2,tensor=2,pipe=2", "interleaved-1f1b", 4, shard="layer"),
    Case("block", "context=2,tensor=2,pipe=2", "1f1b"),
    Case("mlp", "2x2x2", "zb-h1", 3),
    Case("mlp", "1x8x1", "1f1b", shard="none"),
    Case("whole", "2x2x2", "1f1b", vocab="split"),
    Case("norm", "1x2x4", "1f1b", 4, sequence="on"),
    Case("norm", "4x2x1", "1f1b", shard="step"),
    Case("norm without parameters", "2x2x2", "zb-h1", 3, vocab="split"),
    Case("attention", "2x2x2", "zb-h1", 3),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_own_classes_equal_one_device(case: Case) -> None:
    step = {"mesh": case.mesh, "schedule": case.schedule, "sequence": case.sequence, "shard": case.shard}
    num_chunks = 2 if case.schedule in ("zb-v", "interleaved-1f1b") else 1
    sizes = {"num_microbatches": case.microbatches, "num_sequences": 8 * case.microbatches, "num_chunks": num_chunks}
    found = broken(own_model(case.model), tolerance=TOLERANCE, bubbles="nan", vocab=case.vocab, **step, **sizes)
    assert found == {}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "schedule"), [("2x2x2", "zb-h1"), ("2x4x1", "gpipe"), ("1x1x8", "1f1b")])
def test_noise_losses_and_metrics_of_a_block_are_the_same_on_every_mesh(mesh: str, schedule: str) -> None:
    config = replace(own_model("block"), block=f"{own_blocks.__name__}:NoiseBlock")
    found = []
    for where, microbatches in ((mesh, 2), ("1x1x1", 1)):
        cut = {"num_microbatches": microbatches, "num_sequences": 16}
        step = pipeline_step(config, mesh=where, schedule=schedule, key=jax.random.key(3), **cut)
        metrics = step.run(step.params, step.batch)[0].metrics
        square = float(metrics["square"])
        assert float(metrics["layer_loss"]) == pytest.approx(0.1 * square, rel=1e-6)
        found.append((answer_of(step), square))
    assert beyond(errors_of(found[0][0], found[1][0]), tolerance=TOLERANCE) == {}
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
