"""The planner counts and prices models whose first layers are dense."""

from dataclasses import replace

import jax
import pytest
from trellax.layers import flops_per_token, model_rules, param_counts
from trellax.meshes import MeshSpec, ShardingRules, build_mesh
from trellax.pipeline import split_transformer, stage_costs
from trellax.plan import TrainQuestion, search_train
from trellax.plan.costs.device_params import block_params, expert_matrices
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import step_memory
from trellax.plan.costs.minimum_traffic import StepSizes, minimum_bytes
from trellax.plan.costs.runtime import TRELLAX, trellax_runtime
from trellax.plan.costs.serving.held import weight_bytes
from trellax.plan.costs.stage_time import stage_layers
from trellax.plan.costs.step_time import layer_times, step_time
from trellax.plan.machines.topology import read_topology

from .test_experts import MODEL

MIXED = replace(MODEL, num_layers=6, dense_layers=2, ffn_size=512, router_bias="on", dtype="float32")
DENSE = replace(
    MIXED, num_experts=0, experts_per_token=0, expert_size=0, shared_size=0, dense_layers=0, router_bias="off"
)
EXPERTS = replace(MIXED, dense_layers=0)


def test_counts_are_those_of_both_kinds() -> None:
    dense, experts, mixed = (param_counts(config) for config in (DENSE, EXPERTS, MIXED))
    assert (mixed.dense_block, mixed.block) == (dense.block, experts.block)
    assert mixed.total == dense.total - 4 * dense.block + 4 * experts.block
    flops = [flops_per_token(config, num_tokens=64).weights for config in (DENSE, EXPERTS, MIXED)]
    assert 6 * flops[2] == 2 * flops[0] + 4 * flops[1]


@pytest.mark.parametrize(
    ("mesh", "layers"),
    [("tensor=2,pipe=2", (3, 3)), ("data=2,expert=2,pipe=2", (4, 2)), ("pipe=4", (1, 2, 2, 1)), ("tensor=2", (6,))],
)
def test_weights_are_those_of_the_arrays(mesh: str, layers: tuple[int, ...]) -> None:
    spec = MeshSpec.parse(mesh)
    there = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    rules = model_rules(MIXED, there.shape, rules=ShardingRules.of(spec.roles))
    model = split_transformer(MIXED, mesh=there, layers_per_stage=layers, vocab="split", rules=rules)
    held = sum(map(_bytes, jax.tree.leaves(model.params)))
    layout = Layout(
        data=spec.data, tensor=spec.tensor, pipe=spec.pipe, expert=spec.expert, microbatches=2, layers_per_stage=layers
    )
    uses = step_memory(MIXED, layout=layout, num_tokens=64, runtime=replace(TRELLAX, vocab="split"))
    assert {round(use.weights) for use in uses} == {held}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    size = leaf.dtype.itemsize
    for dim in leaf.sharding.shard_shape(leaf.shape):
        size *= dim
    return size


def test_a_step_takes_the_time_of_its_layers() -> None:
    topology = read_topology("h100x8")
    runtime = trellax_runtime(MIXED, topology.accelerator)
    times = layer_times(MIXED, layout=Layout(), runtime=runtime, topology=topology, num_tokens=512)
    assert len(times) == 2
    dense, experts, mixed = (
        step_time(config, layout=Layout(), topology=topology, num_tokens=512).pipeline_s
        for config in (DENSE, EXPERTS, MIXED)
    )
    assert 6 * mixed == pytest.approx(2 * dense + 4 * experts)


def test_stages_are_balanced_by_time() -> None:
    wide = replace(MIXED, ffn_size=8192)
    layers = stage_layers(wide, Layout(pipe=2, microbatches=2), runtime=TRELLAX)
    costs = [cost.forward for cost in stage_costs(wide, layers_per_stage=layers, num_tokens=64)]
    others = [
        max(cost.forward for cost in stage_costs(wide, layers_per_stage=(count, 6 - count), num_tokens=64))
        for count in range(1, 6)
    ]
    assert max(costs) == min(others)
    assert layers != (3, 3)


def test_dense_layers_send_nothing_over_expert() -> None:
    sizes = StepSizes(
        model=MIXED, mesh=MeshSpec.parse("data=2,expert=2"), num_microbatches=3, num_sequences=2, num_tokens=64
    )
    found, pairs = minimum_bytes(sizes), 2 * 64 * 2 * 256 * 4
    assert found["expert"] == 4 * 4 * 3 * pairs / 2
    assert found["data"] == 8 * 4 * expert_matrices(MIXED, tensor=1, expert=2) / 2


def test_search_plans_a_model_of_two_kinds() -> None:
    question = TrainQuestion(model=MIXED, topology=read_topology("h100x8"), batch_size=32, num_tokens=512)
    best = search_train(question)[0]
    assert best.layout.tensor in (1, 2, 4, 8)
    assert best.step is not None


def test_a_server_reads_layers_of_both_kinds() -> None:
    held = weight_bytes(MIXED, layout=Layout(pipe=2))
    counts = param_counts(MIXED)
    ends = counts.total - counts.blocks
    blocks = 3 * block_params(EXPERTS, tensor=1) + 2 * block_params(DENSE, tensor=1)
    assert held == 2 * (blocks + ends / 2)
