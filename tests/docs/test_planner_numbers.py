"""Numbers of the planner in the documentation are those that the planner computes now."""

import re
from pathlib import Path
from typing import Any

import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.plan.costs.inference_time import inference_time
from trellax.plan.costs.layout import Layout
from trellax.plan.machines.topology import read_topology
from trellax.plan.serving_search import ServeQuestion, price_serving

DOCS = Path(__file__).parents[2] / "docs"


def numbers_after(text: str, sentence: str, count: int) -> list[str]:
    """Return the first numbers after a sentence of a text."""
    return re.findall(r"\d+\.\d+", text.partition(sentence)[2])[:count]


def serve(layout: Layout, *, batch: int):
    return inference_time(
        load_config("llama3-70b-64gpu").model,
        layout=layout,
        topology=read_topology(f"a100x{layout.num_devices}"),
        batch=batch,
        prompt=512,
        generated=128,
    )


def test_speed_of_one_request_over_tensor_is_the_models() -> None:
    text = (DOCS / "concepts" / "planner.md").read_text()
    one = serve(Layout(), batch=1).latency_s
    expected = [f"{one / serve(Layout(tensor=parts), batch=1).latency_s:.2f}" for parts in (2, 4, 8)]
    assert numbers_after(text, "The model says", 3) == expected


def test_throughput_over_pipe_is_the_models() -> None:
    text = (DOCS / "concepts" / "planner.md").read_text()
    expected = []
    for batch in (256, 8):
        one = serve(Layout(), batch=batch).tokens_per_s
        expected += [f"{serve(Layout(pipe=parts), batch=batch).tokens_per_s / one:.2f}" for parts in (2, 4)]
    assert numbers_after(text, "rule says 1.8 and 3.2 times. The model says", 4) == expected


def rows_of(text: str, head: str) -> dict[str, list[str]]:
    """Return the cells of the table with this head, by the first of a line."""
    lines = text.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return {first: rest for first, *rest in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_memory_and_traffic_over_tensor_and_pipe_are_the_models() -> None:
    text = (DOCS / "concepts" / "planner.md").read_text()
    question = ServeQuestion(model=load_config("llama3-70b-64gpu").model, topology=read_topology("a100x4"), requests=64)
    expected = {}
    for name, layout in (("tensor=4", Layout(tensor=4)), ("pipe=4", Layout(pipe=4))):
        plan = price_serving(question, layout)
        parts = [plan.memory.weights, plan.memory.kv_cache, plan.memory.activations]
        sent = sum(plan.traffic_bytes.values()) / 1e6
        cells = [*(f"{part / 1e9:.1f} GB" for part in parts), f"{sent:.{0 if sent > 100 else 1}f} MB"]
        expected[name] = [*cells, f"{serve(layout, batch=1).latency_s:.2f} s"]
    assert rows_of(text, "| a device, 64 requests |") == expected


def test_serving_layouts_of_the_tutorial_are_the_models() -> None:
    text = (DOCS / "tutorials" / "which-mesh.md").read_text()
    model, topology = load_config("llama3-70b-64gpu").model, read_topology("a100-80gbx8")
    for name, (alone, full, _) in rows_of(text, "| layout | one request alone |").items():
        sizes: dict[str, Any] = {axis: int(size) for axis, size in (part.split("=") for part in name.split())}
        layout = Layout(**sizes)
        inference = price_serving(ServeQuestion(model=model, topology=topology), layout).inference
        single = price_serving(ServeQuestion(model=model, topology=topology, requests=1), layout).inference
        assert inference is not None
        assert single is not None
        assert alone == f"{single.latency_s:.2f} s"
        assert full in ("fewer", f"{inference.tokens_per_s:,.0f}")


def test_offloaded_plan_is_an_excerpt_of_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (DOCS / "how-to" / "offload.md").read_text().split("```text\n")
    excerpt = blocks[1].partition("```")[0].splitlines()
    assert len(excerpt) == 2
    assert main(["plan", "llama3-70b-64gpu", "--topology", "h200x8"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in excerpt if line not in told] == []
