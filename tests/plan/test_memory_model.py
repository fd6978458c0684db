"""Predicted memory equals the formulas of the literature, and is near that of compiled programs."""

from dataclasses import replace

import pytest
from trellax.configs.layout import layout_of
from trellax.layers import ModelConfig
from trellax.pipeline import lower
from trellax.pipeline.lowering.tables import Ends
from trellax.plan.costs.activations import layer_activation_bytes
from trellax.plan.costs.layout import Layout, PlanRemat
from trellax.plan.costs.memory_model import fullest, peak_in_flight, step_memory
from trellax.plan.costs.pipeline_time import plan_schedule
from trellax.plan.costs.runtime import MEGATRON, TRELLAX, OnOff
from trellax.schedules import Vocab, simulate

from ..programs.steps import report_of, setup_of

S, B, H, A = 2048, 4, 6144, 64
GPT_22B = ModelConfig(vocab_size=51200, num_layers=48, hidden_size=H, num_heads=A, max_tokens=S, dtype="bfloat16")

# Korthikanti et al. 2022, Table 2: bytes of a layer.
FORMULAS = [
    (1, "off", "none", S * B * H * (34 + 5 * A * S / H)),
    (8, "off", "none", S * B * H * (10 + 24 / 8 + 5 * A * S / (H * 8))),
    (8, "on", "none", S * B * H * (34 / 8 + 5 * A * S / (H * 8))),
    (8, "off", "selective", S * B * H * (10 + 24 / 8)),
    (8, "on", "selective", S * B * H * 34 / 8),
    (8, "off", "full", 2 * S * B * H),
]


@pytest.mark.parametrize(("tensor", "sequence_parallel", "remat", "expected"), FORMULAS)
def test_activations_of_a_layer_are_korthikantis_to_the_byte(
    tensor: int, sequence_parallel: OnOff, remat: PlanRemat, expected: float
) -> None:
    layout = Layout(tensor=tensor, sequences=B, remat=remat)
    runtime = replace(MEGATRON, sequence_parallel=sequence_parallel)
    assert layer_activation_bytes(GPT_22B, layout=layout, runtime=runtime, num_tokens=S) == round(expected)


@pytest.mark.parametrize("vocab", ["split", "ends"])
@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("1f1b", 1),
        ("zb-h1", 1),
        ("interleaved-1f1b", 2),
        ("interleaved-1f1b", 4),
        ("zb-v", 2),
        ("v-half", 2),
        ("v-min", 2),
        ("dualpipev", 2),
    ],
)
def test_formulas_of_microbatches_in_flight_agree_with_the_simulator(name: str, chunks: int, vocab: Vocab) -> None:
    for ranks, microbatches in ((2, 4), (4, 4), (4, 16), (8, 8), (8, 32)):
        sizes = {"num_ranks": ranks, "num_microbatches": microbatches, "num_chunks": chunks}
        traits = replace(TRELLAX, vocab=vocab, pair_overlap="off").order_traits
        peaks = peak_in_flight(name, **sizes, traits=traits)
        schedule = plan_schedule(name, **sizes, traits=traits)
        assert max(peaks) == max(simulate(schedule).peak_in_flight)
        paired = peak_in_flight(name, **sizes, traits=replace(traits, pair_overlap="on"))
        ends: Ends = "together" if vocab == "split" else "alone"
        tables = lower(schedule, ends=ends, overlap=True)
        assert max(paired) >= tables.num_residual_slots >= max(peaks)
        assert tables.steady is None or max(paired) == tables.num_residual_slots


SIZES = "--data.seq_len 64 --model.max_tokens 64 --model.hidden_size 64 --model.num_layers 8"
QUICK = [
    ("2x2x2", ""),
    ("1x1x4", "--pipeline.remat dots"),
    ("2x2x1", "--train.shard optimizer"),
    ("2x2x2", "--train.shard step"),
    ("4x1x2", "--train.shard layer"),
]
MORE = [
    ("1x1x1", ""),
    ("2x1x1", "--pipeline.remat dots"),
    ("1x2x1", ""),
    ("4x1x1", ""),
    ("1x1x2", ""),
    ("1x1x2", "--pipeline.remat dots"),
    ("1x2x2", ""),
    ("2x1x2", "--train.shard optimizer"),
    ("8x1x1", "--train.shard step"),
    ("8x1x1", "--train.shard layer"),
    ("2x2x2", "--train.shard layer --pipeline.schedule zb-h1"),
    ("1x1x4", ""),
    ("2x1x4", ""),
    ("1x2x4", ""),
    ("1x2x4", "--pipeline.remat dots"),
    ("1x1x2", "--pipeline.schedule gpipe"),
    ("1x2x2", "--pipeline.schedule gpipe"),
    ("1x1x2", "--pipeline.schedule interleaved-1f1b --pipeline.chunks 2"),
    ("1x1x4", "--pipeline.schedule interleaved-1f1b --pipeline.chunks 2"),
    ("1x1x4", "--pipeline.schedule zb-h1"),
    ("1x1x2", "--pipeline.schedule zb-h1"),
]


def error_of(mesh: str, extra: str) -> float:
    setup, memory = setup_of(mesh, f"{SIZES} {extra}"), report_of(mesh, f"{SIZES} {extra}").memory
    config = setup.config
    layout = layout_of(config, num_devices=config.mesh.num_devices)
    # Compiled for CPUs, where messages do not overlap products unless they are told to.
    runtime = replace(TRELLAX, vocab=config.pipeline.vocab, pair_overlap="off")
    found = fullest(step_memory(config.model, layout=layout, num_tokens=config.data.seq_len, runtime=runtime))
    assert found.weights == memory.parameters
    compiled = memory.parameters + memory.optimizer + memory.activations
    return (found.weights + found.optimizer + found.activations) / compiled - 1


@pytest.mark.parametrize(("mesh", "extra"), QUICK)
def test_memory_is_within_5_percent_of_compiled_programs(mesh: str, extra: str) -> None:
    assert abs(error_of(mesh, extra)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "extra"), MORE)
def test_memory_is_within_5_percent_of_more_compiled_programs(mesh: str, extra: str) -> None:
    assert abs(error_of(mesh, extra)) < 0.05


def test_moments_on_the_host_are_those_of_the_compiled_program() -> None:
    words = f"{SIZES} --train.shard layer --train.offload optimizer"
    setup, memory = setup_of("2x2x2", words), report_of("2x2x2", words).memory
    layout = layout_of(setup.config, num_devices=8)
    runtime = replace(TRELLAX, vocab=setup.config.pipeline.vocab)
    sizes = {"layout": layout, "num_tokens": setup.config.data.seq_len, "runtime": runtime}
    found = fullest(step_memory(setup.config.model, **sizes))
    assert found.host == memory.host == 2 * memory.parameters
    assert found.optimizer == 0
    # Two counts of steps stay on the device.
    assert memory.optimizer == 8
    assert sum(memory.classes.values()) == memory.total
    plain = report_of("2x2x2", f"{SIZES} --train.shard layer").memory
    assert plain.host == 0
    assert plain.optimizer - memory.optimizer == memory.host
