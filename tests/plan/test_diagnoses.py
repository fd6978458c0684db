"""Every mistake is found where it is made, with its number, and a sound layout has none."""

from dataclasses import replace

import pytest
from trellax.layers import ModelConfig
from trellax.plan.costs.layout import Layout
from trellax.plan.diagnoses import Diagnosis, diagnose
from trellax.plan.machines.topology import read_topology
from trellax.plan.training_search import TrainQuestion, price_layout

from .models import GPT2, LLAMA_8B, QWEN3_30B
from .test_experts import MODEL

CASES = {
    "tensor-over-pcie": ("a100-pciex8", Layout(tensor=8, microbatches=64, remat="full")),
    "tensor-across-nodes": ("h100x16/4", Layout(tensor=8, data=2, microbatches=32, remat="full", zero=1)),
    "slow-axis-on-fast-link": ("h100x12/6", Layout(tensor=4, pipe=3, microbatches=64, remat="full")),
    "too-few-microbatches": ("h100x8", Layout(pipe=8, microbatches=4, sequences=16, remat="full")),
    "uneven-turns": ("h100x8", Layout(pipe=4, tensor=2, schedule="zb-h1", microbatches=64, remat="full")),
    "bubble-in-expectation": ("h100x8", Layout(pipe=8, microbatches=64, remat="full")),
    "unbalanced-stages": ("h100x8", Layout(pipe=2, data=4, microbatches=16, remat="full", layers_per_stage=(20, 12))),
    "out-of-memory": ("h100x8", Layout(data=8, microbatches=8)),
    "over-xla-limit": (
        "h100x8",
        Layout(data=2, pipe=4, schedule="interleaved-1f1b", chunks=4, microbatches=32, zero=1),
    ),
    "remat-would-save": (
        "h200x8",
        Layout(tensor=2, data=2, pipe=2, microbatches=32, sequences=2, zero=1, remat="dots"),
    ),
}


def found(machine: str, layout: Layout, model: ModelConfig = LLAMA_8B, num_tokens: int = 8192) -> dict[str, Diagnosis]:
    question = TrainQuestion(
        model=model, topology=read_topology(machine), batch_size=layout.batch_size, num_tokens=num_tokens
    )
    return {one.name: one for one in diagnose(question, price_layout(question, layout))}


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_found_with_its_number(name: str) -> None:
    diagnosis = found(*CASES[name])[name]
    assert diagnosis.number > 0
    assert diagnosis.fix.endswith(".")


def test_tensor_too_wide_for_the_hidden_size() -> None:
    layout = Layout(tensor=4, data=2, microbatches=8, sequences=1)
    assert found("h100x8", layout, GPT2, 1024)["tensor-too-wide"].number > 0.3


EXPERTS = replace(MODEL, num_experts=64, experts_per_token=8)


def test_experts_over_several_nodes_are_found_with_a_smaller_axis() -> None:
    layout = Layout(data=16, expert=16, microbatches=4, zero=2)
    diagnosis = found("h100x16/8", layout, EXPERTS, 512)["experts-across-nodes"]
    assert 0 < diagnosis.number < 1
    assert diagnosis.change["mesh.expert"] in (1, 2, 4, 8)
    assert diagnosis.change["mesh.data"] == 16 // diagnosis.change["mesh.expert"]
    assert "experts-across-nodes" not in found("h100x16/8", replace(layout, expert=8), EXPERTS, 512)


def test_experts_that_do_not_fit_are_split_over_more_devices() -> None:
    layout = Layout(data=8, microbatches=4, sequences=2, remat="full", zero=3)
    diagnosis = found("h100x8", layout, QWEN3_30B, 4096)["out-of-memory"]
    assert diagnosis.change == {"mesh.data": 1, "mesh.expert": 8}


def test_a_mesh_with_a_smaller_tensor_axis_has_its_own_expert_axis() -> None:
    layout = Layout(data=2, expert=2, tensor=8, microbatches=32, remat="full", zero=1)
    change = found("h100x16", layout, QWEN3_30B, 4096)["tensor-too-wide"].change
    assert (change["mesh.tensor"], change["mesh.expert"]) == (1, 8)


def test_context_of_a_sequence_that_one_device_holds_is_needless() -> None:
    assert "needless-parallelism" in found("h100x8", Layout(context=8, microbatches=64), GPT2, 1024)


def test_shards_of_a_batch_are_named_by_the_axes_of_the_mesh() -> None:
    diagnosis = found("h100x64/8", Layout(data=64, expert=4, zero=1), EXPERTS, 64)["batch-too-small"]
    assert "on each of data=16 x expert=4:" in diagnosis.message


def test_batch_too_small_for_the_data_axis() -> None:
    layout = Layout(data=64, remat="full", zero=1)
    assert found("h100x64/8", layout, GPT2, 128)["batch-too-small"].number > 0.2


def test_needless_parallelism_of_a_model_that_fits_one_device() -> None:
    layout = Layout(tensor=2, pipe=4, microbatches=64)
    assert "needless-parallelism" in found("h100x8", layout, GPT2, 1024)


def test_sound_layout_has_no_warning() -> None:
    layout = Layout(data=8, microbatches=4, sequences=8, remat="dots")
    assert not [one for one in found("h100x8", layout, GPT2, 1024).values() if one.severity != "note"]
