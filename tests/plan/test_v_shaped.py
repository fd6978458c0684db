"""V-shaped schedules in the plan: messages, parameters and layers of a rank follow the placement."""

from collections import Counter
from dataclasses import fields, replace

import pytest
from trellax.meshes import MeshSpec
from trellax.plan.costs.activations import boundary_bytes
from trellax.plan.costs.device_params import block_params, device_params, ends_of
from trellax.plan.costs.layer_time import LayerTime
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.minimum_traffic import StepSizes, minimum_bytes
from trellax.plan.costs.pipeline_time import find_placement
from trellax.plan.costs.runtime import MEGATRON, TRELLAX
from trellax.plan.costs.stage_time import EndCosts, stage_times
from trellax.plan.costs.update_time import update_time
from trellax.plan.legal_layouts import legal_layouts
from trellax.plan.machines.topology import read_topology
from trellax.plan.suggestions import fuller_pipes
from trellax.plan.training_search import TrainQuestion, price_layout
from trellax.schedules import Placement, StageCost, build_schedule

from .models import GPT2, LLAMA_8B

ENDS = replace(TRELLAX, vocab="ends")
V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipev")


@pytest.mark.parametrize(
    ("name", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("v-half", 2)]
)
@pytest.mark.parametrize("pipe", [2, 3, 4])
def test_minimum_of_pipe_traffic_is_what_the_busiest_rank_sends(name: str, chunks: int, pipe: int) -> None:
    schedule = build_schedule(name, num_ranks=pipe, num_microbatches=5, num_chunks=chunks)
    sizes = StepSizes(
        model=GPT2,
        mesh=MeshSpec(data=2, pipe=pipe),
        num_microbatches=5,
        num_sequences=1,
        num_tokens=64,
        num_chunks=chunks,
        placement=schedule.placement,
    )
    sent = Counter(message.sender for message in schedule.messages())
    assert minimum_bytes(sizes)["pipe"] == max(sent.values()) * sizes.boundary


def test_uneven_layers_are_summed_over_the_stages_of_a_rank() -> None:
    sizes = StepSizes(
        model=GPT2,
        mesh=MeshSpec(pipe=2),
        num_microbatches=2,
        num_sequences=1,
        num_tokens=64,
        num_chunks=2,
        layers_per_stage=(1, 2, 3, 6),
    )
    placed = replace(sizes, placement=Placement.of("v", num_ranks=2, num_chunks=2))
    assert [sizes.layers_of(rank) for rank in (0, 1)] == [1 + 3, 2 + 6]
    assert [placed.layers_of(rank) for rank in (0, 1)] == [1 + 6, 2 + 3]


def test_first_rank_of_a_v_holds_embedding_and_head() -> None:
    placement = Placement.of("v", num_ranks=3, num_chunks=2)
    assert [ends_of(placement, rank) for rank in range(3)] == [("embedding", "head"), (), ()]
    assert [ends_of(Placement.of("loop", num_ranks=3), rank) for rank in range(3)] == [("embedding",), (), ("head",)]


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_tied_table_is_held_once_in_a_v(embeddings: str) -> None:
    model = replace(GPT2, embeddings="tied" if embeddings == "tied" else "untied")
    layout = Layout(pipe=4, schedule="v-half", chunks=2, microbatches=8)
    both, one, none = (
        device_params(model, layout=layout, runtime=ENDS, layers=((model, 3),), ends=ends)
        for ends in (("embedding", "head"), ("embedding",), ())
    )
    table = model.vocab_size * model.hidden_size
    assert none == 3 * block_params(model, tensor=1)
    assert both - one == (0 if embeddings == "tied" else table)


def test_gradient_of_a_tied_table_is_summed_between_two_ranks_only() -> None:
    topology = read_topology("h100x8")
    times = {
        ends: update_time(
            replace(GPT2, embeddings="tied"),
            layout=Layout(pipe=4, schedule="v-half", chunks=2, microbatches=8),
            runtime=ENDS,
            topology=topology,
            layers=((GPT2, 3),),
            ends=ends,
        ).tied
        for ends in (("embedding",), ("embedding", "head"))
    }
    assert times["embedding",] > 0
    assert times["embedding", "head"] == 0


def test_rank_holds_its_layers_there_and_back() -> None:
    layout = Layout(pipe=2, schedule="v-half", chunks=2, microbatches=4, layers_per_stage=(1, 2, 3, 6))
    # One program for all ranks pads stages to the largest; a program for each does not.
    apart = replace(MEGATRON, vocab="split")
    sizes = {"num_tokens": 64, "runtime": apart}
    weights = [use.weights for use in step_memory(GPT2, layout=layout, **sizes)]
    loop = replace(layout, schedule="interleaved-1f1b")
    of_loop = [use.weights for use in step_memory(GPT2, layout=loop, **sizes)]
    block = apart.weight_bytes * block_params(GPT2, tensor=1)
    padded = [use.weights for use in step_memory(GPT2, layout=layout, num_tokens=64)]
    assert padded[0] == padded[1]
    assert weights[0] - weights[1] == pytest.approx(2 * block)
    assert of_loop[1] - of_loop[0] == pytest.approx(4 * block)


@pytest.mark.parametrize(("name", "share"), [("zb-v", 8 / 8), ("v-half", 5 / 8), ("v-min", 4 / 8)])
def test_activations_of_layers_fall_to_the_share_in_flight(name: str, share: float) -> None:
    """ZB-H1, with split backwards too, holds 8 microbatches on 8 ranks."""
    whole = Layout(pipe=8, schedule="zb-h1", microbatches=64)
    # Beside the layers there are three buffers of an activation between stages.
    buffers = 3 * boundary_bytes(LLAMA_8B, layout=whole, runtime=TRELLAX, num_tokens=8192)
    found, old = (
        fullest(step_memory(LLAMA_8B, layout=layout, num_tokens=8192)).activations - buffers
        for layout in (replace(whole, schedule=name, chunks=2), whole)
    )
    assert found / old == pytest.approx(share, rel=1e-9)


def test_placement_of_a_searched_schedule_is_that_of_the_schedule() -> None:
    layout = Layout(pipe=4, schedule="auto", chunks=2, microbatches=8, max_in_flight=3)
    sizes = {"num_tokens": 64, "runtime": replace(TRELLAX, vocab="split")}
    assert find_placement(GPT2, layout=layout, **sizes) == Placement.of("v", num_ranks=4, num_chunks=2)
    assert find_placement(GPT2, layout=replace(layout, chunks=1), **sizes).is_loop


def test_blocking_hops_are_no_work_in_the_turn_of_a_v() -> None:
    layer = LayerTime(**dict.fromkeys((field.name for field in fields(LayerTime)), 1.0))
    none = StageCost(forward=0, input_grad=0, weight_grad=0)
    stages = stage_times(
        [layer] * 4,
        ends=EndCosts(embedding=none, head=none, shared_loss=0, hop=0.5),
        runtime=replace(MEGATRON, blocking_hops="on"),
        placement=Placement.of("v", num_ranks=2, num_chunks=2),
    )
    # Stage 1 hands over to stage 2 on its own rank.
    assert [stage.forward for stage in stages] == [1.5, 1.0, 1.5, 1.0]
    assert [stage.input_grad - stages[0].input_grad for stage in stages] == [0, 0.5, 0, 0.5]


def test_search_offers_a_v_where_layers_divide_in_two_chunks() -> None:
    sizes = {"num_devices": 4, "batch_size": 8}
    names = {layout.schedule for layout in legal_layouts(replace(GPT2, num_layers=8), **sizes) if layout.pipe == 4}
    assert {"zb-v", "v-half", "v-min"} <= names
    few = {layout.schedule for layout in legal_layouts(replace(GPT2, num_layers=6), **sizes) if layout.pipe == 4}
    assert not few & set(V_SHAPED)


def test_idle_pipeline_is_compared_with_a_v() -> None:
    question = TrainQuestion(model=LLAMA_8B, topology=read_topology("h100x8"), batch_size=8, num_tokens=8192)
    tried = {layout.schedule for layout in fuller_pipes(question, Layout(pipe=8, microbatches=8))}
    assert {"zb-v", "v-half"} <= tried


def test_split_backwards_cost_what_lockstep_turns_cost() -> None:
    """In lockstep a turn lasts as long as its longest action; by the compiled programs 6.13, 7.54 and 7.82 s.

    The seconds are modelled on programs for H200 before clocks sink (benchmarks/RESULTS.md, "Steps of large models").
    """
    machine = read_topology("h200x8")
    topology = replace(machine, accelerator=machine.accelerator.in_bursts)
    question = TrainQuestion(model=LLAMA_8B, topology=topology, batch_size=64, num_tokens=8192)
    for name, chunks, expected_s in (("1f1b", 1, 6.13), ("zb-h1", 1, 7.54), ("zb-v", 2, 7.82)):
        layout = Layout(pipe=8, schedule=name, chunks=chunks, microbatches=64, remat="dots")
        assert price_layout(question, layout).time_s == pytest.approx(expected_s, rel=0.08)
