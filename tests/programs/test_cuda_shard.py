"""Sequence parallelism, and weights split over data, in programs for GPUs that are not present."""

from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from trellax.programs.hlo import Computation, HloModule
from trellax.programs.timeline.overlap import Span, _Products, list_spans

from .test_cuda import inspect
from .test_cuda_overlap import bytes_of

pytestmark = pytest.mark.cuda

EIGHT_SHARDS = "llama3-8b-8gpu h200:8 --mesh.data 8 --mesh.tensor 1 --mesh.pipe 1 --pipeline.microbatches 8"
LAYERS, ROUNDS = 32, 8
LAYER_PARAMS = 4096 * (4096 + 2 * 1024 + 2 * 14336) + (4096 + 14336) * 4096
TABLES = 2 * 128256 * 4096


def read(words: str, **more: str) -> Any:
    return inspect(words, **more)


def sent(report: Any, axis: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in report["traffic"]:
        if row["axis"] == axis:
            found[row["kind"]] += row["bytes"]
    return found


def starts_first(program: HloModule, computation: Computation, span: Span) -> bool:
    """Whether a collective starts before the first product of the computation that it is in, a layer's."""
    finder = _Products(program)
    ahead = takewhile(lambda one: one.name != span.start.name, computation.instructions.values())
    return not any(finder.is_one(one, computation) for one in ahead)


def test_70b_sums_no_activation_over_tensor_and_holds_an_eighth() -> None:
    split, whole = (read(f"llama3-70b-64gpu h100:64/8 --mesh.sequence {choice}") for choice in ("on", "off"))
    # What is left in all-reduces over tensor are the gradients of norms, once.
    assert sent(split, "tensor")["all-reduce"] < 2 * 4 * 80 * 2 * 8192
    assert sent(split, "pipe")["collective-permute"] * 8 == sent(whole, "pipe")["collective-permute"]
    assert split["memory_bytes"]["activations"] == pytest.approx(whole["memory_bytes"]["activations"] / 8, rel=0.05)


def test_weights_gathered_once_a_step_send_six_bytes_a_parameter() -> None:
    found = sent(inspect(f"{EIGHT_SHARDS} --train.shard step"), "data")
    params = LAYERS * LAYER_PARAMS + TABLES
    assert found["all-gather"] == pytest.approx(2 * params * 7 / 8, rel=0.01)
    assert found["reduce-scatter"] == pytest.approx(4 * params * 7 / 8, rel=0.01)


def test_every_layer_has_one_gather_and_it_starts_before_all_products_of_the_layer_before(tmp_path: Path) -> None:
    report = read(f"{EIGHT_SHARDS} --train.shard layer", hlo=str(tmp_path / "step.hlo"))
    found, part = sent(report, "data"), LAYERS * ROUNDS * LAYER_PARAMS * 7 / 8
    # The last layer of the forward is the first of the backward: its weights are there.
    once = TABLES * 7 / 8
    assert found["all-gather"] == pytest.approx(2 * (2 - 1 / LAYERS) * part + 2 * once, rel=0.02)
    assert found["reduce-scatter"] == pytest.approx(4 * part + 4 * once, rel=0.01)
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    gathers = [
        (computation, span)
        for computation, span in list_spans(program)
        if span.kind == "all-gather" and span.end is not None and bytes_of(span.end) == 2 * LAYER_PARAMS
    ]
    of_layers = [bool(span.products) and starts_first(program, computation, span) for computation, span in gathers]
    # A gather need not wait for sums of gradients: 0.04 of the bytes, 0.15 with one collective at a time.
    (row,) = [row for row in report["exposed"] if row["axis"] == "data"]
    assert row["share"] < 0.08
    # One in the loop of the forward and one in that of the backward; the first of each loop has nothing before it.
    assert sum(of_layers) >= 2
    assert len(of_layers) <= 4
