"""What a compiled step with a context axis keeps, sends and computes, beside the formulas."""

import re
from typing import Any, get_args

import pytest
from trellax.commands.inspect_step import step_sizes
from trellax.layers import ModelConfig, Remat, activation_bytes
from trellax.layers.context.choice import choose_context_attention
from trellax.plan.costs.activations import split_backward_bytes
from trellax.plan.costs.minimum_traffic import minimum_bytes
from trellax.programs import hlo_text

from ..programs.steps import compiled_step, report_of, setup_of
from .law import small_model

SEQ, M, LAYERS = 128, 4, 2
"""Tokens of a sequence, microbatches, layers of a pipeline rank."""

WIDE = (
    f"--model.num_kv_heads 2 --data.seq_len {SEQ} --model.max_tokens {SEQ} --model.positions rotary "
    "--pipeline.context_attention gather"
)


def sent_over(axis: str, report: Any) -> dict[str, float]:
    return {row.kind: row.bytes for row in report.traffic if row.axis == axis}


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-h1", marks=pytest.mark.slow)])
def test_activations_and_messages_are_divided_by_context(schedule: str, remat: Remat) -> None:
    extra = f"{WIDE} --pipeline.schedule {schedule} --pipeline.remat {remat}"
    whole, split = (report_of("1x1x2", f"{extra} --mesh.context {size}") for size in (1, 4))
    model = setup_of("1x1x2", extra).config.model
    shapes: dict[str, Any] = {"num_sequences": 8, "num_tokens": SEQ // 4, "tensor": 1, "remat": remat}
    kept = activation_bytes(model, **shapes).layer
    kept += split_backward_bytes(model, **shapes) if schedule == "zb-h1" else 0
    # Two layers for each of two microbatches in flight, and what goes into, out of and between stages.
    slots, x = LAYERS * 2 * kept, activation_bytes(model, **shapes).boundary
    assert split.memory.activations <= 1.05 * (slots + 4 * x)
    if schedule == "1f1b":
        assert split.memory.activations >= slots
        assert split.memory.activations == pytest.approx(whole.memory.activations / 4, rel=0.05)
    sent = [sent_over("pipe", one)["collective-permute"] for one in (whole, split)]
    assert sent[1] == sent[0] / 4


@pytest.mark.parametrize(
    ("mesh", "context", "remat"),
    [("1x1x2", 2, "none"), ("1x1x2", 4, "dots"), pytest.param("1x2x2", 2, "full", marks=pytest.mark.slow)],
)
def test_gathers_send_what_the_formula_says(mesh: str, context: int, remat: str) -> None:
    extra = f"{WIDE} --mesh.context {context} --pipeline.remat {remat} --train.batch_size 32"
    setup, report = setup_of(mesh, extra), report_of(mesh, extra)
    sent, tensor = sent_over("context", report), setup.sizes.tensor
    width = setup.config.model.kv_size // tensor
    once = 2 * 8 * SEQ * width * 4 * (context - 1) // context * LAYERS * M
    # The backward gathers again, once for itself and for a forward that it repeats.
    assert sent["all-gather"] == 2 * once
    assert sent["reduce-scatter"] == once
    # The minimum has one of each, and the sum of gradients of the layers.
    least = next(row.minimum_bytes for row in report.traffic if row.axis == "context" and row.minimum_bytes)
    assert least >= 2 * once
    assert "context: the backward gathers keys and values again" in "".join(report.notes)


def kept_bytes(model: ModelConfig, schedule: str, **shapes: Any) -> float:
    """Return the bytes that a layer keeps of a microbatch."""
    deferred = split_backward_bytes(model, **shapes) if schedule == "zb-h1" else 0
    return activation_bytes(model, **shapes).layer + deferred


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "remat"),
    [("1f1b", "dots"), ("1f1b", "none"), ("zb-h1", "none"), ("zb-h1", "dots"), ("1f1b", "full")],
)
def test_a_gather_that_is_kept_sends_the_least_and_keeps_all_keys(schedule: str, remat: Remat) -> None:
    extra = f"{WIDE} --mesh.context 4 --pipeline.remat {remat} --pipeline.schedule {schedule}"
    twice, once = (
        report_of("1x1x2", f"{extra} --pipeline.context_attention {how}") for how in ("gather", "gather-once")
    )
    model, sent = setup_of("1x1x2", extra).config.model, sent_over("context", once)
    bytes_once = 2 * 8 * SEQ * model.kv_size * 4 * 3 // 4 * LAYERS * M
    assert sent["all-gather"] == bytes_once * (2 if remat == "full" else 1)
    assert sent["reduce-scatter"] == bytes_once
    assert ("gathers keys and values again" in "".join(once.notes)) == (remat == "full")
    shapes: dict[str, Any] = {"num_sequences": 8, "num_tokens": SEQ // 4, "tensor": 1, "remat": remat}
    own, kept = (kept_bytes(model, schedule, key_ranks=ranks, **shapes) for ranks in (1, 4))
    more = once.memory.activations - twice.memory.activations
    assert more == pytest.approx(LAYERS * 2 * (kept - own), rel=0.02)


@pytest.mark.parametrize("remat", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "full"))])
def test_an_exchange_sends_what_the_formula_says(remat: str) -> None:
    extra = f"{WIDE} --pipeline.context_attention ulysses --mesh.context 2 --pipeline.remat {remat}"
    setup, report = setup_of("1x1x2", extra), report_of("1x1x2", extra)
    model = setup.config.model
    heads = model.query_size + model.kv_size
    # Forward and backward: queries, keys, values and outputs, of half the tokens, half of each to the other rank.
    once = 2 * 8 * (SEQ // 2) * heads * 4 // 2 * LAYERS * M
    # A backward that recomputes the layer exchanges its heads once more.
    assert sent_over("context", report)["all-to-all"] == (2 if remat == "none" else 3) * once
    assert any("repeats the exchanges" in note for note in report.notes) == (remat != "none")
    assert "gathers keys" not in "".join(report.notes)
    assert step_sizes(setup).context_attention == "ulysses"


@pytest.mark.slow
def test_gradients_of_experts_are_in_the_minimum_over_context() -> None:
    """Kept keys, sent once each way, and float32 gradients of experts: nothing else is sent over context alone."""
    words = "--mesh.expert 2 --mesh.context 2 --pipeline.context_attention gather-once --pipeline.remat none"
    (row,) = (
        one for one in report_of("1x1x1", words, "tiny-moe").traffic if one.axis == "context" and one.minimum_bytes
    )
    assert row.bytes == pytest.approx(row.minimum_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "over"),
    [
        ("--mesh.context_expert 4", "context_expert"),
        ("--mesh.context 2 --mesh.context_expert 2", "context_expert"),
        ("--mesh.expert 2 --mesh.context_expert 2 --mesh.context 2", "expert+context_expert"),
    ],
)
def test_tokens_of_a_context_rank_travel_to_experts_and_back(mesh: str, over: str) -> None:
    """With room for the mean load, and keys that are kept, nothing is sent above the least over any axes."""
    words = f"{mesh} --pipeline.context_attention gather-once --pipeline.remat none --model.expert_capacity 1.0"
    setup, report = setup_of("1x1x1", words, "tiny-moe"), report_of("1x1x1", words, "tiny-moe")
    model, sizes = setup.config.model, setup.sizes
    pairs = 32 // M // sizes.data * (32 // sizes.context) * model.experts_per_token * model.hidden_size * 4
    sent = 4 * model.num_layers * M * pairs * (sizes.expert - 1) / sizes.expert
    assert sent_over(over, report)["all-to-all"] == sent
    rows = [row for row in report.traffic if row.minimum_bytes]
    assert {row.axis for row in rows} == set(minimum_bytes(step_sizes(setup)))
    assert all(row.bytes == pytest.approx(row.minimum_bytes, rel=0.01) for row in rows)


def test_a_step_has_no_array_of_all_scores() -> None:
    extra = f"{WIDE} --mesh.context 2 --data.seq_len 512 --model.max_tokens 512 --data.packing on"
    shapes = re.findall(r"(?:f32|pred)\[([\d,]+)\]", hlo_text(compiled_step("1x1x2", extra)))
    dims = [sorted(map(int, shape.split(","))) for shape in shapes if "," in shape]
    # A device has 256 of 512 queries; 64 of them at a time meet the 128 keys of a chunk. Logits are of 1024 tokens.
    assert [own for own in dims if own[-2] >= 256 and 1024 not in own] == []


def test_work_of_a_device_is_that_of_one_device_divided() -> None:
    # 1024 tokens: causal blocks compute some masked scores, 1/8 of all on one device and less in pairs of chunks.
    extra = f"{WIDE} --data.seq_len 1024 --model.max_tokens 1024 --pipeline.remat none --train.batch_size 4"
    reports = {size: report_of("1x1x1", f"{extra} --mesh.context {size}") for size in (1, 2, 4)}
    own = {size: report.flops["matrix"] * size for size, report in reports.items()}
    model = {size: (report.model_flops or 0) * size for size, report in reports.items()}
    assert model[1] == model[2] == model[4]
    assert all(model[1] <= work <= 1.01 * own[1] for work in own.values())


def test_auto_takes_what_sends_less_and_divides() -> None:
    mha, gqa, mqa = (small_model(attention=attention) for attention in ("mha", "gqa", "mqa"))
    models, contexts = {"mha": mha, "gqa": gqa, "mqa": mqa}, (2, 4, 8)
    found = {
        (remat, name): [choose_context_attention(model, tensor=1, context=c, remat=remat) for c in contexts]
        for remat in get_args(Remat)
        for name, model in models.items()
    }
    # 8 query heads and 8, 4 or 1 of keys: 4 (N + K) / c against 6 K, and 6 (N + K) / c where a layer is recomputed.
    gather, ulysses = "gather", "ulysses"
    assert found == {
        ("none", "mha"): [ulysses, ulysses, ulysses],
        ("none", "gqa"): [gather, ulysses, gather],
        **{(remat, "mha"): [gather, ulysses, ulysses] for remat in ("dots", "full")},
        **{(remat, "gqa"): [gather, ulysses, gather] for remat in ("dots", "full")},
        **{(remat, "mqa"): [gather, gather, gather] for remat in get_args(Remat)},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "remat"), [(4, "none"), (4, "dots")])
def test_auto_sends_the_least_as_compiled(heads: int, remat: str) -> None:
    extra = f"{WIDE} --model.num_kv_heads {heads} --mesh.context 2 --pipeline.remat {remat}"
    sent = {
        how: sum(sent_over("context", report_of("1x1x2", f"{extra} --pipeline.context_attention {how}")).values())
        for how in ("gather", "ulysses", "auto")
    }
    assert sent["auto"] == min(sent.values())
