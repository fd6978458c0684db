"""The search leaves out only what cannot win: it equals pricing every layout, on small spaces and all objectives."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from trellax.layers import ModelConfig
from trellax.meshes import PlanError
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_bound import MemoryBounds
from trellax.plan.costs.step_bound import StepBounds
from trellax.plan.legal_layouts import device_counts, legal_contexts, legal_layouts
from trellax.plan.machines.topology import read_topology
from trellax.plan.objectives import OBJECTIVES, find_cost
from trellax.plan.plan import Plan
from trellax.plan.training_search import TrainQuestion, TrainSearch, price_layout

DENSE: dict[str, Any] = {"vocab_size": 4096, "num_heads": 8, "num_kv_heads": 4, "dtype": "bfloat16", "bias": "off"}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
KINDS = EXPERTS | {"dense_layers": 3, "mlp": "swiglu", "ffn_size": 4096, "expert_size": 1024}
LATENTS: dict[str, Any] = {"num_kv_heads": 8, "head_size": 96, "rope_head_size": 32, "latent_size": 128}
LATENTS |= {"positions": "rotary", "norm": "rmsnorm"}
NARROW = {"matmuls": "fp8"}

QUESTIONS = st.builds(
    lambda layers, width, tokens, batch, machine, more, remat: TrainQuestion(
        model=ModelConfig(num_layers=layers, hidden_size=width, max_tokens=tokens, **DENSE | more),
        topology=read_topology(machine),
        batch_size=batch,
        num_tokens=tokens,
        remats=(remat, "full"),
    ),
    layers=st.sampled_from([4, 6, 8, 9]),
    width=st.sampled_from([512, 4096]),
    tokens=st.sampled_from([512, 4096]),
    batch=st.sampled_from([1, 4, 8, 12]),
    machine=st.sampled_from(["h100x4", "h200x8/4", "a100-pciex8", "rtx4090x4", "v100x6/2"]),
    more=st.sampled_from([{}, EXPERTS, KINDS, LATENTS, NARROW]),
    remat=st.sampled_from(["none", "dots"]),
)


def price_all(question: TrainQuestion) -> list[Plan]:
    """Every layout with its price, on its own."""
    counts = device_counts(question.topology)
    return [price_layout(question, layout) for count in counts for layout in all_layouts(question, count)]


def all_layouts(question: TrainQuestion, count: int) -> list[Layout]:
    contexts = legal_contexts(num_devices=count, num_tokens=question.num_tokens)
    sizes = {"num_devices": count, "batch_size": question.batch_size, "contexts": contexts}
    return list(legal_layouts(question.model, **sizes, remats=question.remats))


@given(question=QUESTIONS)
@settings(derandomize=True, deadline=None, max_examples=4, phases=[Phase.generate])
def test_search_is_the_best_of_pricing_every_layout(question: TrainQuestion) -> None:
    check_search(question)


@pytest.mark.slow
@given(question=QUESTIONS)
@settings(deadline=None, max_examples=40, phases=[Phase.generate])
def test_search_is_the_best_of_pricing_every_layout_many_times(question: TrainQuestion) -> None:
    check_search(question)


def check_search(question: TrainQuestion) -> None:
    plans = price_all(question)
    limits = (question.memory_limit, question.device_limit)
    fitting = next(filter(None, ([one for one in plans if one.memory.total <= limit] for limit in limits)), [])
    if not fitting:
        with pytest.raises(PlanError):
            TrainSearch(question)
        return
    search = TrainSearch(question)
    costs = {name: find_cost(name, question.topology) for name in OBJECTIVES}

    def cost_of(plan: Plan, name: str) -> float:
        return costs[name](plan.time_s, plan.memory.total, plan.layout)

    for name in OBJECTIVES:
        best: dict[str, float] = {}
        for plan in fitting:
            mesh = str(plan.layout.mesh)
            best[mesh] = min(best.get(mesh, cost_of(plan, name)), cost_of(plan, name))
        found = [cost_of(plan, name) for plan in search.best(objective=name)]
        assert found == sorted(best.values())[:5]
    for names in (("train", "memory"), ("memory", "gpu-hours", "train")):
        points = {tuple(cost_of(plan, name) for name in names) for plan in fitting}
        front = {point for point in points if not any(is_better(other, point) for other in points)}
        found = [tuple(cost_of(plan, name) for name in names) for plan in search.front(*names)]
        assert found == sorted(front)


def is_better(point: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return point != other and all(own <= its for own, its in zip(point, other, strict=True))


@given(question=QUESTIONS, place=st.integers(0, 10_000))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_bounds_are_below_prices_and_close_without_a_pipeline(question: TrainQuestion, place: int) -> None:
    layouts = all_layouts(question, question.topology.num_devices)
    if not layouts:
        return
    layout = layouts[place % len(layouts)]
    given = {"num_tokens": question.num_tokens, "runtime": question.priced_runtime}
    plan = price_layout(question, layout)
    bound_s = StepBounds(question.model, topology=question.topology, **given).time_s(layout)
    assert 0 < bound_s <= plan.time_s
    if layout.pipe == 1:
        assert bound_s == pytest.approx(plan.time_s)
    assert 0 < MemoryBounds(question.model, **given).total(layout) <= plan.memory.total


def test_price_of_a_layout_is_that_of_the_search() -> None:
    model = ModelConfig(num_layers=8, hidden_size=1024, max_tokens=4096, **DENSE, **EXPERTS)
    question = TrainQuestion(model=model, topology=read_topology("h100x16/8"), batch_size=16, num_tokens=4096)
    search = TrainSearch(question)
    found = [*search.best(objective="train", top=50), *search.front("train", "memory")]
    assert {plan.layout.expert for plan in found} > {1}
    assert {plan.layout.context for plan in found} > {1}
    for plan in found:
        assert replace(price_layout(question, plan.layout), why=plan.why) == plan


def test_objective_of_energy_needs_watts() -> None:
    topology = read_topology("tpu-v5px8")
    with pytest.raises(PlanError, match="watts of TPU-v5p are not stated"):
        find_cost("energy", topology)
