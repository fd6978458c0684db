"""The search: legal layouts alone, published examples, speed, and the errors when nothing fits."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.layers import ModelConfig
from trellax.meshes import PlanError
from trellax.plan.costs.inference_time import COMPILED
from trellax.plan.costs.layer_time import layer_time, sum_times
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.pipeline_time import find_placement
from trellax.plan.costs.stage_time import end_costs, stage_layers, stage_times
from trellax.plan.costs.step_time import step_time
from trellax.plan.diagnoses import diagnose
from trellax.plan.legal_layouts import legal_contexts, legal_layouts
from trellax.plan.machines.topology import read_topology
from trellax.plan.pareto_front import draw_front
from trellax.plan.serving_search import ServeQuestion, price_serving, search_serving
from trellax.plan.training_search import TrainQuestion, TrainSearch, layout_memory, search_train
from trellax.schedules import build_schedule, simulate

from .models import GPT2, LLAMA_8B, LLAMA_70B, LLAMA_405B


@given(
    heads=st.sampled_from([4, 6, 8, 12]),
    kv=st.sampled_from([1, 2]),
    layers=st.integers(1, 13),
    devices=st.integers(1, 24),
    batch=st.integers(1, 48),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_layout_is_legal(heads: int, kv: int, layers: int, devices: int, batch: int) -> None:
    model = ModelConfig(vocab_size=96, num_layers=layers, hidden_size=48, num_heads=heads, num_kv_heads=kv)
    for layout in legal_layouts(model, num_devices=devices, batch_size=batch):
        assert layout.num_devices == devices
        assert layout.batch_size == batch
        assert heads % layout.tensor == 0
        assert kv % layout.tensor == 0 or layout.tensor % kv == 0
        assert model.ffn_size % layout.tensor == 0
        assert layout.num_stages <= layers
        assert layout.family.allows_chunks(layout.chunks)


def test_plans_keep_within_xlas_limit_if_any_layout_does() -> None:
    question = TrainQuestion(model=LLAMA_8B, topology=read_topology("h100x8"), batch_size=16, num_tokens=4096)
    assert question.memory_limit == 0.76 * question.topology.accelerator.memory_bytes
    assert all(plan.memory.total <= question.memory_limit for plan in search_train(question))
    # Where none does, what fits the device is taken, with a warning.
    tight = replace(question, topology=read_topology("h100x2"), batch_size=2, num_tokens=8192)
    (plan, *_) = search_train(tight)
    assert tight.memory_limit < plan.memory.total <= tight.device_limit
    assert "over-xla-limit" in {one.name for one in diagnose(tight, plan)}


@pytest.mark.slow
def test_405b_on_1024_devices_is_searched_in_15_seconds_and_drawn_in_20() -> None:
    question = TrainQuestion(model=LLAMA_405B, topology=read_topology("h200x1024"), batch_size=1024, num_tokens=8192)
    start_s = time.process_time()
    search = TrainSearch(question)
    plans = search.best(objective="train")
    assert time.process_time() - start_s < 15
    assert len(plans) == 5
    search.front("train", "memory")
    draw_front(search.priced, objective="train", limit_bytes=question.memory_limit, title="405B")
    assert time.process_time() - start_s < 20


@pytest.mark.parametrize(
    ("model", "machine", "batch", "tokens", "objective"),
    [
        (GPT2, "l40sx8", 16, 1024, "train"),
        pytest.param(LLAMA_8B, "h100x8", 64, 8192, "train", marks=pytest.mark.slow),
        (LLAMA_8B, "h100x8", 16, 4096, "memory"),
        pytest.param(GPT2, "h100x16/4", 32, 1024, "train", marks=pytest.mark.slow),
        pytest.param(GPT2, "l40sx8", 64, 1024, "train", marks=pytest.mark.slow),
        pytest.param(LLAMA_70B, "h100x64/8", 64, 8192, "train", marks=pytest.mark.slow),
        pytest.param(LLAMA_70B, "h100x64/8", 64, 8192, "memory", marks=pytest.mark.slow),
    ],
)
def test_search_finds_the_best_of_simulating_every_layout_whole(
    model: ModelConfig, machine: str, batch: int, tokens: int, objective: str
) -> None:
    question = TrainQuestion(model=model, topology=read_topology(machine), batch_size=batch, num_tokens=tokens)
    best: dict[str, float] = {}
    for count in {question.topology.num_devices, question.topology.devices_per_node, 1}:
        contexts = legal_contexts(num_devices=count, num_tokens=tokens)
        for layout in legal_layouts(model, num_devices=count, batch_size=batch, contexts=contexts):
            memory = layout_memory(question, layout).total
            if memory <= question.memory_limit:
                cost = memory if objective == "memory" else whole_step_s(question, layout)
                best[str(layout.mesh)] = min(best.get(str(layout.mesh), math.inf), cost)
    found = search_train(question, objective=objective)
    costs = [plan.memory.total if objective == "memory" else plan.time_s for plan in found]
    assert costs == pytest.approx(sorted(best.values())[:5], rel=1e-9)


def test_small_batches_may_use_interleaved_zb_h1() -> None:
    model = replace(GPT2, num_layers=24, hidden_size=1024, num_heads=8, num_kv_heads=8, ffn_size=4096)
    question = TrainQuestion(model=model, topology=read_topology("h100x8"), batch_size=4, num_tokens=512)
    # Of those without data shards; without it the best was zb-h1, 11% slower.
    alone = [plan.layout.schedule for plan in search_train(question) if plan.layout.data == 1]
    assert alone[0] == "interleaved-zb-h1"


def whole_step_s(question: TrainQuestion, layout: Layout) -> float:
    """Seconds of a step whose schedule is simulated to its last microbatch, nothing continued."""
    sizes = {"layout": layout, "topology": question.topology, "num_tokens": question.num_tokens}
    step = step_time(question.model, **sizes)
    if layout.pipe == 1:
        return step.time_s
    runtime = question.priced_runtime
    layer = layer_time(question.model, **sizes, runtime=runtime)
    ends = end_costs(question.model, **sizes, runtime=runtime)
    layers = stage_layers(question.model, layout, runtime=question.priced_runtime)
    placement = find_placement(question.model, layout=layout, num_tokens=question.num_tokens, runtime=runtime)
    times = [sum_times([(layer, count)]) for count in layers]
    stages = stage_times(times, ends=ends, runtime=runtime, placement=placement)
    schedule = build_schedule(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        num_chunks=layout.chunks,
        vocab="split",
    )
    whole = simulate(schedule, stages=stages, transfer=ends.hop, shared_loss=ends.shared_loss).makespan
    return step.time_s - step.pipeline_s + whole


def mesh_of(model: ModelConfig, machine: str, objective: str) -> dict[str, int]:
    question = ServeQuestion(model=model, topology=read_topology(machine))
    return search_serving(question, objective=objective)[0].layout.mesh.sizes


@pytest.mark.parametrize(
    ("machine", "objective", "mesh"),
    [
        ("a100x8", "latency", {"data": 1, "tensor": 8, "pipe": 1}),
        ("a100x8", "throughput", {"data": 1, "tensor": 1, "pipe": 8}),
        ("a100x8", "balanced", {"data": 1, "tensor": 4, "pipe": 2}),
        ("a100-pciex8", "throughput", {"data": 1, "tensor": 1, "pipe": 8}),
        ("l40sx8", "throughput", {"data": 1, "tensor": 1, "pipe": 8}),
    ],
)
def test_70b_on_eight_devices(machine: str, objective: str, mesh: dict[str, int]) -> None:
    assert mesh_of(LLAMA_70B, machine, objective) == mesh


@pytest.mark.parametrize("machine", ["a100x32", "h100x32"])
def test_400b_on_four_nodes_is_tensor_inside_and_pipe_across(machine: str) -> None:
    assert mesh_of(LLAMA_405B, machine, "balanced") == {"data": 1, "tensor": 8, "pipe": 4}


def test_a_model_that_fits_one_device_is_served_by_one_device_each() -> None:
    assert mesh_of(LLAMA_8B, "h100x8", "throughput") == {"data": 8, "tensor": 1, "pipe": 1}


def test_a_small_model_is_not_pipelined() -> None:
    question = TrainQuestion(model=GPT2, topology=read_topology("h100x8"), batch_size=256, num_tokens=1024)
    mesh = search_train(question)[0].layout.mesh
    assert (mesh.tensor, mesh.pipe) == (1, 1)


def test_one_device_is_enough_for_one_sequence_of_a_tiny_model() -> None:
    model = ModelConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4, dtype="bfloat16")
    question = TrainQuestion(model=model, topology=read_topology("h100x8"), batch_size=1, num_tokens=64)
    assert search_train(question)[0].layout.num_devices == 1


# "TP=2: 1.7x, TP=4: 2.9x, TP=8: 4.5x faster for one request", of 140 GB on NVSwitch; by servers of few kernels a layer.
@pytest.mark.parametrize(("tensor", "expected"), [(2, 1.7), (4, 2.9), (8, 4.5)])
def test_tensor_speeds_up_one_request_as_the_field_expects(tensor: int, expected: float) -> None:
    question = ServeQuestion(model=LLAMA_70B, topology=read_topology("a100x8"), requests=1, server=COMPILED)
    one, many = (price_serving(question, Layout(tensor=size)).inference for size in (1, tensor))
    assert one is not None
    assert many is not None
    assert math.isclose(one.latency_s / many.latency_s, expected, rel_tol=0.06)


def test_weights_of_70b_are_35_gb_for_tensor_4_and_for_pipe_4_the_tables_too() -> None:
    question = ServeQuestion(model=LLAMA_70B, topology=read_topology("a100x8"), requests=8)
    tensor, pipe = (price_serving(question, layout).memory for layout in (Layout(tensor=4), Layout(pipe=4)))
    assert [round(memory.weights / 1e9) for memory in (tensor, pipe)] == [35, 40]
    # Stages beside the tables have fewer layers, and every rank has room for the most, 21.
    assert pipe.kv_cache == tensor.kv_cache * 21 / 20
    assert tensor.activations < pipe.activations


def test_moments_go_to_the_host_only_if_nothing_fits_without() -> None:
    question = TrainQuestion(model=LLAMA_8B, topology=read_topology("h200x1"), batch_size=8, num_tokens=8192)
    (plan,) = search_train(question)
    assert plan.layout.offload == "optimizer"
    kept = replace(plan.layout, offload="none")
    assert layout_memory(question, kept).total > question.device_limit
    assert layout_memory(question, kept).optimizer == plan.memory.host == plan.numbers["host_bytes"]
    # 16 bytes a parameter over 63 GB/s of PCI Express 5.0, in seconds.
    copies_s = 2 * plan.memory.host / 63e9
    times = [
        step_time(LLAMA_8B, layout=layout, topology=question.topology, num_tokens=8192).time_s
        for layout in (plan.layout, kept)
    ]
    assert times[0] - times[1] == pytest.approx(copies_s)
    two = search_train(replace(question, topology=read_topology("h200x2")))
    assert {one.layout.offload for one in two} == {"none"}


@pytest.mark.parametrize(("name", "machine", "batch"), [("too_large", "a100x8", 64), ("batch", "h100x16384", 7)])
def test_error_of_an_impossible_request_names_a_possible_one(
    name: str, machine: str, batch: int, golden: Callable[[str, str], None]
) -> None:
    # Too short to be split over context.
    question = TrainQuestion(model=LLAMA_405B, topology=read_topology(machine), batch_size=batch, num_tokens=1024)
    with pytest.raises(PlanError) as caught:
        search_train(question)
    golden(f"errors/plan/plan_{name}.txt", str(caught.value))


def test_error_of_a_model_too_large_to_serve_names_a_machine_that_holds_it(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        search_serving(ServeQuestion(model=LLAMA_405B, topology=read_topology("h100x8")), objective="latency")
    golden("errors/plan/plan_serving.txt", str(caught.value))


def test_offloaded_residuals_are_those_of_the_tables() -> None:
    layout = Layout(pipe=8, schedule="1f1b", microbatches=32, sequences=1, remat="dots")
    away = replace(layout, offload="residuals")
    question = TrainQuestion(model=LLAMA_8B, topology=read_topology("h200x8"), batch_size=32, num_tokens=8192)
    here, there = (layout_memory(question, one) for one in (layout, away))
    # One slot by each: 16 on the host, one of them unused; 16 on the device, or 3 and one in transit each way.
    slot = there.host / 16
    assert slot == pytest.approx(3.09e9, rel=0.01)
    assert here.total - there.total == pytest.approx(11 * slot)
    times = [step_time(LLAMA_8B, layout=one, topology=question.topology, num_tokens=8192) for one in (layout, away)]
    assert times[1].time_s - times[0].time_s == pytest.approx(times[1].host_s)
    assert times[1].host_s >= 32 * slot / 63e9
