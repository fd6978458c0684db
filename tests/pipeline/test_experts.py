"""Mixtures of experts equal one device, with experts whole, split over expert and over tensor, in any schedule."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from trellax.layers import ModelConfig, model_rules
from trellax.meshes import ModelError, ShardingRules

from .law import answer_of, broken, one_device, pipeline_step, relative_distances, small_model
from .test_bfloat16 import BAND, check

TOLERANCE = 2e-5  # as in test_law.py, for the same reason


def experts(
    *,
    capacity: float = 1.25,
    overflow: Literal["rounds", "drop"] = "rounds",
    shared: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **more: Any,
) -> ModelConfig:
    """Eight experts, of which a token uses two; an expert that has three times the mean load takes three rounds."""
    sizes: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2, "expert_size": 64, "shared_size": shared}
    sizes |= {"balance_loss": 0.05, "router_z_loss": 0.01, "expert_capacity": capacity, "expert_overflow": overflow}
    return replace(small_model(style="llama", attention="gqa", dtype=dtype), **sizes | more)


@dataclass(frozen=True)
class Case:
    mesh: str
    schedule: str
    microbatches: int = 2
    sequence: Literal["on", "off"] = "off"
    shard: Literal["none", "step", "layer"] = "none"
    capacity: float = 1.25

    def __str__(self) -> str:
        shard = f"-{self.shard}" * (self.shard != "none")
        return f"{self.mesh}-{self.schedule}-m{self.microbatches}-seq_{self.sequence}{shard}-c{self.capacity}"


CASES = (
    Case("expert=2,tensor=2,pipe=2", "1f1b", sequence="on"),
    Case("data=2,expert=2,pipe=2", "zb-h1", 3, capacity=0.4),
    Case("expert=2,context_expert=2,tensor=2", "1f1b", sequence="on", shard="layer", capacity=0.4),
)

MORE_CASES = (
    Case("2x2x2", "1f1b"),
    Case("data=2,expert=2,tensor=2", "1f1b", sequence="on", shard="layer", capacity=0.4),
    Case("context_expert=8", "1f1b", 1, capacity=0.3),
    Case("context_expert=4,pipe=2", "zb-v", 3, capacity=0.4),
    Case("context=2,context_expert=2,tensor=2", "1f1b", sequence="on", shard="step", capacity=0.4),
    Case("2x2x2", "zb-h1", 5, sequence="on", shard="layer"),
    Case("1x2x4", "interleaved-1f1b", 4, sequence="on"),
    Case("expert=4,tensor=2", "1f1b", sequence="on", capacity=0.3),
    Case("expert=8", "1f1b", 1),
    Case("expert=4,pipe=2", "zb-v", 3, capacity=0.4),
    Case("expert=2,tensor=2,pipe=2", "v-half", 4, sequence="on", capacity=0.4),
    Case("data=2,expert=2,pipe=2", "1f1b", 4, shard="step"),
    Case("data=2,expert=2,tensor=2", "gpipe", 3, shard="layer"),
    Case("data=4,expert=2", "1f1b", 2, shard="layer", capacity=0.4),
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_experts_equal_one_device(case: Case) -> None:
    config = experts(capacity=case.capacity)
    step = {"mesh": case.mesh, "schedule": case.schedule, "sequence": case.sequence, "shard": case.shard}
    num_chunks = 2 if case.schedule in ("zb-v", "v-half", "interleaved-1f1b") else 1
    sizes = {"num_microbatches": case.microbatches, "num_sequences": 8 * case.microbatches, "num_chunks": num_chunks}
    assert broken(config, tolerance=TOLERANCE, bubbles="nan", **step, **sizes) == {}


@pytest.mark.parametrize(
    "more",
    [
        {"router": "sigmoid", "router_groups": 4, "router_groups_kept": 2, "router_scale": 2.5},
        pytest.param(
            {"mlp": "clamped_swiglu", "bias": "on", "router_bias": "trained", "attention_sinks": "on", "capacity": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param({"router_normalize": "off", "shared": 0}, marks=pytest.mark.slow),
        pytest.param({"mlp": "gelu", "shared": 0}, marks=pytest.mark.slow),
        pytest.param({"experts_per_token": 8, "capacity": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_routers_of_other_kinds_equal_one_device(more: dict[str, Any]) -> None:
    top = more.pop("experts_per_token", 2)
    config = replace(experts(**more), experts_per_token=top)
    step = {"mesh": "expert=2,tensor=2,pipe=2", "schedule": "1f1b", "num_microbatches": 2, "num_sequences": 16}
    assert broken(config, tolerance=TOLERANCE, sequence="on", **step) == {}


def test_capacity_changes_no_number() -> None:
    """One round of all tokens, or seven rounds: the same loss and gradients on one device."""
    few, all_at_once = (one_device(experts(capacity=capacity), 8) for capacity in (0.2, 4.0))
    errors = relative_distances(few, all_at_once)
    assert max(errors.values()) < 1e-5


def test_dropped_tokens_are_counted_and_change_the_loss() -> None:
    sizes = {"mesh": "data=2,expert=2,pipe=2", "schedule": "1f1b", "num_microbatches": 2, "num_sequences": 16}
    outs = []
    for overflow in ("rounds", "drop"):
        step = pipeline_step(experts(capacity=0.5, overflow=overflow), **sizes)
        out, _ = step.run(step.params, step.batch)
        outs.append(out)
    kept, dropped = outs
    assert float(kept.metrics["dropped_pairs"]) == 0
    assert float(dropped.metrics["dropped_pairs"]) > 0
    assert float(kept.loss) != float(dropped.loss)
    # Each of 8 layers has every token twice, and each row is one layer.
    num_tokens = step.batch["tokens"].size
    np.testing.assert_array_equal(kept.metrics["expert_tokens"].sum(-1), np.full(8, 2 * num_tokens))


def test_dropped_pairs_are_those_of_a_mesh_without_tensor() -> None:
    """Devices of tensor that split tokens or features drop the same pairs, and count them once."""
    sizes: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 1, "num_sequences": 8}
    config, found = experts(capacity=0.5, overflow="drop"), []
    for mesh, sequence in (("expert=2", "off"), ("expert=2,tensor=2", "off"), ("expert=2,tensor=2", "on")):
        step = pipeline_step(config, mesh=mesh, sequence=sequence, **sizes)
        out, _ = step.run(step.params, step.batch)
        found.append((float(out.metrics["dropped_pairs"]), float(out.loss)))
    assert found[0][0] > 0
    for dropped, loss in found[1:]:
        assert dropped == found[0][0]
        np.testing.assert_allclose(loss, found[0][1], rtol=1e-5)


def test_experts_in_bfloat16_are_near_one_device_in_bfloat16() -> None:
    """Routing is in float32, but its input is rounded: where two experts score alike, another one may be chosen."""
    config = experts(dtype="bfloat16")
    step = {"mesh": "expert=2,tensor=2,pipe=2", "schedule": "1f1b", "num_microbatches": 2, "num_sequences": 16}
    found = relative_distances(answer_of(pipeline_step(config, sequence="on", **step)), one_device(config, 16))
    assert found["loss"] <= BAND["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        {"mesh": "expert=2,tensor=2,pipe=2", "schedule": "1f1b", "sequence": "on"},
        {"mesh": "data=2,expert=4", "schedule": "1f1b", "shard": "layer"},
    ],
    ids=str,
)
def test_gradients_of_experts_in_bfloat16_are_near_one_device_in_bfloat16(step: dict[str, Any]) -> None:
    """Every token goes to all experts, so rounding chooses no other: what is sent and summed is compared."""
    config = replace(experts(dtype="bfloat16", capacity=0.6), experts_per_token=8)
    ours = answer_of(pipeline_step(config, num_microbatches=2, num_sequences=16, **step))
    low, high = (one_device(replace(config, dtype=dtype), 16) for dtype in ("bfloat16", "float32"))
    check(ours, low, high)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9 of num_experts=8"),
        ({"num_experts": -1}, "num_experts=-1 is negative"),
        ({"num_experts": 0}, "experts_per_token=2, but num_experts=0"),
        (
            {"num_experts": 0, "experts_per_token": 0, "expert_size": 0, "router": "sigmoid"},
            "router=sigmoid, but num_experts=0",
        ),
        ({"expert_capacity": 0.0}, "expert_capacity=0.0 must be above 0"),
        ({"router_groups": 3}, "num_experts=8 does not split over router_groups=3"),
        ({"router_groups": 0}, "router_groups=0: all experts are one group"),
        ({"router_groups": 8, "router_groups_kept": 1}, "hold fewer than experts_per_token=2"),
        ({"router_groups": 2, "router_groups_kept": 3}, "router_groups_kept=3 of router_groups=2"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        replace(experts(shared=0, mlp="swiglu"), balance_loss=0.0, router_z_loss=0.0, **change)


@pytest.mark.parametrize(
    ("config", "sizes", "match"),
    [
        (experts(), {"expert": 3}, "num_experts=8 does not split over expert=3"),
        (small_model(style="llama"), {"expert": 2}, "expert=2 splits experts, and the model has none"),
        (replace(experts(), expert_size=6), {"tensor": 4}, "expert_size=6 does not split over tensor=4"),
    ],
    ids=["experts", "dense", "features"],
)
def test_meshes_that_do_not_fit_are_refused(config: ModelConfig, sizes: dict[str, int], match: str) -> None:
    from trellax.meshes.axes import MeshAxes

    axes = MeshAxes.of(pipe="pipe", data="batch", expert="expert", tensor="tensor")
    with pytest.raises(ModelError, match=match):
        model_rules(config, sizes, rules=ShardingRules.of(axes))
