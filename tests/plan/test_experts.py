"""The planner counts, prices and searches mixtures of experts."""

from dataclasses import replace
from typing import Any

import jax
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer
from trellax.meshes import MeshSpec, PlanError
from trellax.plan.costs.device_params import block_params, expert_matrices
from trellax.plan.costs.layer_time import layer_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.minimum_traffic import StepSizes, minimum_bytes
from trellax.plan.costs.runtime import TRELLAX
from trellax.plan.costs.update_time import update_time
from trellax.plan.legal_layouts import legal_layouts
from trellax.plan.machines.collective_time import Group, collective_time_s
from trellax.plan.machines.topology import read_topology

SIZES: dict[str, Any] = {"vocab_size": 1024, "num_layers": 4, "hidden_size": 256, "num_heads": 8, "max_tokens": 512}
STYLE: dict[str, Any] = {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off"}
MODEL = ModelConfig(
    num_experts=8, experts_per_token=2, expert_size=128, shared_size=64, dtype="bfloat16", **SIZES, **STYLE
)


def test_parameters_of_a_block_are_those_of_the_model() -> None:
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0))), nnx.Param))
    assert MODEL.num_layers * block_params(MODEL, tensor=1) == sum(
        leaf.size for leaf in jax.tree.leaves(params["blocks"])
    )
    experts = [params["blocks"]["mlp"][name]["kernel"].size for name in ("up", "gate", "down")]
    assert MODEL.num_layers * expert_matrices(MODEL, tensor=2, expert=4) == sum(experts) // 8


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_split_experts_take_their_part_of_memory(zero: Any) -> None:
    whole, split = (
        fullest(step_memory(MODEL, layout=Layout(data=8, expert=parts, zero=zero), num_tokens=512, runtime=TRELLAX))
        for parts in (1, 8)
    )
    experts = 4 * MODEL.num_layers * expert_matrices(MODEL, tensor=1)
    # Kept split over data all the same, experts take no less; kept whole, an eighth.
    saved = {0: experts * 7 / 8, 2: 0, 3: 0}[zero]
    assert whole.weights - split.weights == pytest.approx(saved)


def test_all_to_all_is_priced() -> None:
    topology = read_topology("h200x8/8")
    alone, split = (
        layer_time(MODEL, layout=Layout(data=8, expert=parts), runtime=TRELLAX, topology=topology, num_tokens=512)
        for parts in (1, 8)
    )
    assert alone.exposed == 0
    group = Group(size=8, per_node=8)
    rows = MODEL.num_experts * MODEL.expert_rows(512) * MODEL.hidden_size * 2
    there = collective_time_s("all_to_all", num_bytes=rows, group=group, topology=topology)
    # There and back, forward and backward.
    assert split.exposed == pytest.approx(4 * there)


def test_least_traffic_is_every_pair_there_and_back_twice() -> None:
    mesh = MeshSpec.parse("data=2,expert=4")
    sizes = StepSizes(model=MODEL, mesh=mesh, num_microbatches=3, num_sequences=2, num_tokens=512)
    found = minimum_bytes(sizes)
    pairs = 2 * 512 * 2 * 256 * 2
    assert found["expert"] == 4 * MODEL.num_layers * 3 * pairs * 3 / 4
    # Experts over data alone, in float32 there and bfloat16 back; all else over data and expert.
    assert found["data"] == 6 * MODEL.num_layers * expert_matrices(MODEL, tensor=1, expert=4) / 2
    assert set(found) == {"expert", "data", "data+expert"}


def test_gradients_of_experts_are_summed_over_context_too() -> None:
    """Devices of context hold other tokens, as those of data do, and the same experts."""
    given: dict[str, Any] = {"model": MODEL, "num_microbatches": 3, "num_sequences": 2, "num_tokens": 512}
    found = minimum_bytes(StepSizes(mesh=MeshSpec.parse("expert=2,context=2"), **given))
    over_data = minimum_bytes(StepSizes(mesh=MeshSpec.parse("data=2,expert=2"), **given))["data"]
    # Keys and values, half of 512 tokens of 2 sequences to the other rank, there and back.
    keys = 2 * (2 * 256 * 2 * 256 * 2) * MODEL.num_layers * 3
    assert found["context"] == over_data + keys
    assert set(found) == {"context", "expert", "expert+context"}


def test_time_of_the_update_has_gradients_of_experts_over_context() -> None:
    topology, layers = read_topology("h200x8/8"), ((MODEL, 4),)
    given: dict[str, Any] = {"runtime": TRELLAX, "topology": topology, "layers": layers, "ends": ()}
    over_data, over_context = (
        update_time(MODEL, layout=Layout(data=data, context=4 // data, expert=2), **given).reduce for data in (4, 2)
    )
    assert over_context == pytest.approx(over_data)


def test_search_splits_experts_over_devices_that_divide_both() -> None:
    layouts = list(legal_layouts(MODEL, num_devices=16, batch_size=64))
    assert {layout.expert for layout in layouts} == {1, 2, 4, 8}
    assert all(layout.data % layout.expert == 0 for layout in layouts)
    dense = replace(MODEL, num_experts=0, experts_per_token=0, expert_size=0, shared_size=0)
    assert {layout.expert for layout in legal_layouts(dense, num_devices=16, batch_size=64)} == {1}


def test_experts_that_data_does_not_hold_are_refused() -> None:
    with pytest.raises(PlanError, match="data=2 does not split over expert=4"):
        Layout(data=2, expert=4)
