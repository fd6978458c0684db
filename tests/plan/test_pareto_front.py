"""The Pareto front and its picture: the numbers of the table, every point named, no text over another."""

from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import BboxBase
from trellax.layers import ModelConfig
from trellax.plan.machines.topology import read_topology
from trellax.plan.pareto_front import front_axis, name_point, pareto_front, plot_front
from trellax.plan.plan import Plan
from trellax.plan.serving_search import ServeQuestion, price_all_serving, rank_serving
from trellax.plan.training_search import TrainQuestion, TrainSearch

from .models import GPT2, LLAMA_8B, LLAMA_70B

CASES = [
    (LLAMA_8B, "h100x8", "train"),
    pytest.param(LLAMA_70B, "h100x64/8", "train", marks=pytest.mark.slow),
    (GPT2, "h100x1024", "memory"),
    (LLAMA_70B, "a100x8", "throughput"),
    (LLAMA_70B, "h100x64/8", "balanced"),
    (LLAMA_8B, "h100x8", "latency"),
]


def draw(model: ModelConfig, machine: str, objective: str) -> tuple[list[Plan], list[Plan], Figure]:
    """What is drawn, what the table shows, and the picture."""
    topology = read_topology(machine)
    if objective in ("train", "memory"):
        question = TrainQuestion(model=model, topology=topology, batch_size=64, num_tokens=1024)
        search = TrainSearch(question)
        ranked = search.best(objective=objective)
        search.front("train", "memory")
        priced = search.priced
    else:
        question = ServeQuestion(model=model, topology=topology)
        priced = price_all_serving(question, objective=objective)
        ranked = rank_serving(priced, objective=objective)
    limit = question.memory_limit
    return priced, ranked, plot_front(priced, objective=objective, limit_bytes=limit, title="a search")


@pytest.mark.parametrize(("model", "machine", "objective"), CASES)
def test_picture_shows_the_numbers_of_the_table_and_names_every_point(
    model: ModelConfig, machine: str, objective: str
) -> None:
    priced, ranked, figure = draw(model, machine, objective)
    axis = front_axis(objective)
    drawn = {plan.layout: (axis.value(plan), plan.memory.total) for plan in priced}
    assert all(drawn[plan.layout] == (axis.value(plan), plan.memory.total) for plan in ranked)
    front = pareto_front(priced, axis=axis)
    if objective in ("train", "latency", "throughput"):
        assert axis.value(front[0]) == axis.value(ranked[0])
    names = [name_point(plan, axis) for plan in front]
    assert len(set(names)) == len(front)
    (listed,) = figure.axes[1].texts
    assert [line[4:] for line in listed.get_text().splitlines()] == names
    numbers = [text.get_text().split("-") for text in figure.axes[0].texts]
    covered = [n for first, *last in numbers for n in range(int(first), int((last or [first])[0]) + 1)]
    assert covered == list(range(1, len(front) + 1))
    _nothing_overlaps(figure)


def _nothing_overlaps(figure: Figure) -> None:
    figure.draw_without_rendering()
    axes, below = figure.axes
    numbers, ticks = [_box(text) for text in axes.texts], [_box(text) for text in axes.get_xticklabels()]
    for boxes in (numbers, ticks, [_box(text) for text in axes.get_yticklabels()]):
        assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    inside = axes.get_window_extent()
    legend = axes.get_legend()
    assert legend is not None
    for box in (legend.get_window_extent(), _box(axes.title), _box(below.texts[0])):
        assert not box.overlaps(inside)
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        assert box.x1 <= figure.bbox.x1
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in numbers)


def _box(text: Text) -> BboxBase:
    return text.get_window_extent()
