"""Precisions of 8 and 4 bits are predicted as 16 bits, and the plan and the benchmark's table say so."""

from dataclasses import replace

import pytest
from trellax.plan.costs.layout import Layout
from trellax.plan.diagnoses import diagnose
from trellax.plan.machines.topology import read_topology
from trellax.plan.serving_search import ServeQuestion, price_serving
from trellax.plan.training_search import TrainQuestion, price_layout

from benchmarks.planner.accuracy import measure_accuracy
from benchmarks.planner.predictions import unpriced_precision
from benchmarks.planner.rows import PublishedRow

from .models import GPT2

PRECISIONS = {
    "bf16": "",
    "fp16 mixed": "",
    "bf16, fp32 gradient accumulation": "",
    "fp8": "fp8",
    "amp_fp8": "fp8",
    "float8 rowwise": "fp8",
    "FP8-CS (FP8-MX)": "fp8",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
}
SIZES = {"vocab": 50304, "layers": 4, "hidden": 512, "heads": 8, "seq": 512, "gpus": 8, "gpu": "H100 SXM"}


def row(precision: str) -> PublishedRow:
    inputs = {**SIZES, "dp": 8, "mbs": 1, "gbs": 8, "recompute": "none", "precision": precision}
    return PublishedRow(
        source="test",
        id=precision,
        kind="train",
        value_kind="measured",
        provenance="",
        inputs=inputs,
        outputs={"step_time_s": 1.0},
        derived={},
        unstated=(),
        has_sequence_parallel=True,
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_benchmark_names_precisions_that_are_priced_as_another(precision: str) -> None:
    narrow = PRECISIONS[precision]
    assert unpriced_precision({"precision": precision}) == narrow
    (found,) = measure_accuracy({"test": [row(precision)]})
    assert found.quantity == (f"step_time {narrow} as bf16" if narrow else "step_time")


def test_plans_of_a_model_in_fp8_say_that_they_are_priced_as_bfloat16() -> None:
    topology = read_topology("h100x8")
    for matmuls, expected in (("plain", []), ("fp8", ["priced-as-bfloat16"])):
        model = replace(GPT2, dtype="bfloat16", matmuls=matmuls)
        question = TrainQuestion(model=model, topology=topology, batch_size=256, num_tokens=1024)
        serving = price_serving(ServeQuestion(model=model, topology=topology, requests=1), Layout())
        training = price_layout(question, Layout(data=8, microbatches=4, sequences=8, remat="dots"))
        for plan in (training, serving):
            assert [one.name for one in diagnose(question, plan) if one.severity != "note"] == expected
