"""The planner splits experts over context ranks and data shards together, the nearest first."""

from dataclasses import replace
from typing import Any

import pytest
from trellax.configs import load_config
from trellax.configs.layout import layout_of
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, PlanError
from trellax.plan.costs.device_params import expert_matrices
from trellax.plan.costs.layer_time import layer_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.minimum_traffic import StepSizes, minimum_bytes
from trellax.plan.costs.runtime import TRELLAX
from trellax.plan.costs.update_time import update_time
from trellax.plan.diagnoses import diagnose
from trellax.plan.legal_layouts import expert_splits, legal_layouts
from trellax.plan.machines.topology import read_topology
from trellax.plan.suggestions import closer_experts, layout_change
from trellax.plan.training_search import TrainQuestion, price_layout

SIZES: dict[str, Any] = {"vocab_size": 1024, "num_layers": 4, "hidden_size": 256, "num_heads": 8, "max_tokens": 8192}
STYLE: dict[str, Any] = {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off"}
MODEL = ModelConfig(num_experts=8, experts_per_token=2, expert_size=128, dtype="bfloat16", **SIZES, **STYLE)


def test_context_ranks_split_experts_before_data_shards_do() -> None:
    found = expert_splits(MODEL, data=4, context=2)
    assert found == [{"expert": expert, "context_expert": near} for expert, near in ((1, 1), (2, 2), (4, 2), (8, 2))]
    assert [Layout(data=4, context=2, **split).data_expert for split in found] == [1, 1, 2, 4]
    # One sequence over all devices of a node.
    assert expert_splits(MODEL, data=1, context=8)[-1] == {"expert": 8, "context_expert": 8}
    # 3 of 3 x 2 ranks cannot be taken from 2 of context; 6 can.
    splits = expert_splits(replace(MODEL, num_experts=12), data=3, context=2)
    assert [one["expert"] for one in splits] == [1, 2, 3, 6]


def test_layouts_of_a_search_split_experts_over_both() -> None:
    layouts = list(legal_layouts(MODEL, num_devices=8, batch_size=2, contexts=(4,)))
    assert {(layout.data, layout.expert) for layout in layouts} >= {(1, 4), (2, 8)}
    assert {layout.mesh.num_devices for layout in layouts} == {8}
    assert all(layout.mesh.expert == layout.expert and layout.mesh.context == 4 for layout in layouts)


@pytest.mark.parametrize(
    "mesh", ["--mesh.data 2 --mesh.context 2 --mesh.context_expert 2", "--mesh.expert 2 --mesh.context_expert 4"]
)
def test_layout_of_a_config_has_its_mesh(mesh: str) -> None:
    config = load_config("tiny-moe", f"{mesh} --mesh.pipe 1 --train.batch_size 32")
    layout = layout_of(config, num_devices=8)
    assert {name: size for name, size in layout.mesh.sizes.items() if size > 1} == {
        name: size for name, size in config.mesh.sizes.items() if size > 1
    }


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_experts_over_context_ranks_take_as_much_memory_as_over_data(zero: Any) -> None:
    over_data, over_context = (
        fullest(step_memory(MODEL, layout=replace(layout, zero=zero), num_tokens=512, runtime=TRELLAX))
        for layout in (Layout(data=2, context=4, expert=2), Layout(data=2, context=4, expert=2, context_expert=2))
    )
    assert over_context == over_data
    # One sequence over 8 devices: experts that are not split over data are split at last.
    alone, split = (
        fullest(step_memory(MODEL, layout=layout, num_tokens=512, runtime=TRELLAX))
        for layout in (Layout(context=8), Layout(context=8, expert=8, context_expert=8))
    )
    assert alone.weights - split.weights == 4 * MODEL.num_layers * expert_matrices(MODEL, tensor=1) * 7 / 8


def test_near_experts_cost_less_than_experts_of_other_nodes() -> None:
    topology = read_topology("h200x16/8")
    given: dict[str, Any] = {"runtime": TRELLAX, "topology": topology}
    layouts = (Layout(data=2, context=8, expert=2), Layout(data=2, context=8, expert=2, context_expert=2))
    far, near = (layer_time(MODEL, layout=layout, num_tokens=8192, **given).exposed for layout in layouts)
    assert near < far
    # Copies of an expert are 8 devices both ways: of a node where another node has the other experts.
    within, across = (
        update_time(MODEL, layout=layout, layers=((MODEL, 4),), ends=(), **given).reduce for layout in layouts
    )
    assert within < across


def test_least_traffic_names_the_axes_of_both() -> None:
    mesh = MeshSpec.parse("data=2,expert=2,context=2,context_expert=2")
    found = minimum_bytes(StepSizes(model=MODEL, mesh=mesh, num_microbatches=3, num_sequences=2, num_tokens=512))
    tokens = 2 * 512 / 4
    assert found["expert+context_expert"] == 4 * MODEL.num_layers * 3 * tokens * 2 * 256 * 2 * 3 / 4
    assert found["data+context"] == 6 * MODEL.num_layers * expert_matrices(MODEL, tensor=1, expert=4) * 3 / 4
    keys = 2 * MODEL.num_layers * 3 * tokens * 3 * 2 * 256 * 2
    assert found["context+context_expert"] == keys
    assert set(found) == {
        "data+context",
        "expert+context_expert",
        "context+context_expert",
        "data+expert+context+context_expert",
    }


def test_experts_across_nodes_move_to_context_ranks() -> None:
    layout = Layout(data=2, context=8, expert=2, sequences=1, zero=2)
    model, topology = replace(MODEL, num_experts=64, experts_per_token=8), read_topology("h100x16/8")
    question = TrainQuestion(model=model, topology=topology, batch_size=2, num_tokens=8192)
    moved = replace(layout, context_expert=2)
    assert "experts-across-nodes" in names_of(question, layout)
    assert "experts-across-nodes" not in names_of(question, moved)
    assert moved in closer_experts(question, layout)
    assert layout_change(layout, moved) == {
        "mesh.data": 2,
        "mesh.expert": 1,
        "mesh.context": 4,
        "mesh.context_expert": 2,
    }


def names_of(question: TrainQuestion, layout: Layout) -> set[str]:
    return {one.name for one in diagnose(question, price_layout(question, layout))}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 2, "expert": 4, "context_expert": 4}, "context=2 does not split over context_expert=4"),
        ({"context": 4, "expert": 2, "context_expert": 4}, "expert=2 does not split over context_expert=4"),
        (
            {"context": 2, "expert": 8, "context_expert": 2, "data": 2},
            "data=2 does not split over expert / context_expert=4",
        ),
    ],
)
def test_experts_of_ranks_that_are_not_there_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Layout(**sizes)
