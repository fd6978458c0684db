"""Numbers of the planner in the documentation are those that the planner computes now."""

import re
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.plan.costs.inference_time import inference_time
from trellax.plan.costs.layout import Layout
from trellax.plan.machines.topology import read_topology

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


def test_offloaded_plan_is_an_excerpt_of_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (DOCS / "how-to" / "offload.md").read_text().split("```text\n")
    excerpt = blocks[1].partition("```")[0].splitlines()
    assert len(excerpt) == 2
    assert main(["plan", "llama3-70b-64gpu", "--topology", "h200x8"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in excerpt if line not in told] == []
