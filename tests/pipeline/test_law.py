"""The law: loss, every gradient and the global gradient norm of any mesh and schedule equal those of one device.

The reference is `cross_entropy` of all logits under plain `jax.value_and_grad` on the whole batch. The tolerance is
2e-5 relative, in float32: both sides add the same terms in another order (over data shards, tensor ranks and
microbatches), so they differ by the rounding of a sum, about 1e-7 x sqrt(number of terms). With the 256 tokens or more
of a batch and eight layers that stays near 2e-6, a factor of ten below. A gradient that is scaled or lacks a part is
off by 1e-1 or more. What each gradient is compared with is said in `errors_of`.
"""

from dataclasses import dataclass
from itertools import product
from typing import get_args

import pytest
from trellax.layers import ModelConfig, Remat
from trellax.schedules import Vocab

from .law import KV_HEADS, answer_of, beyond, errors_of, one_device, pipeline_step, small_model

TOLERANCE = 2e-5

MESHES = ("1x1x1", "8x1x1", "1x8x1", "1x1x8", "2x2x2", "1x2x4", "4x1x2")
"""Data x tensor x pipe."""

SCHEDULES = ("naive", "gpipe", "1f1b", "zb-h1")
CHUNKED = (("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("interleaved-zb-h1", 2), ("interleaved-zb-h1", 4))
"""Interleaved schedules with their chunks; four chunks need eight stages, so they run on two pipeline ranks."""

MICROBATCHES = (1, 2, 3, 8)
NUM_LAYERS = 8

MODELS: dict[str, ModelConfig] = {
    "mha-tied": small_model(style="gpt", attention="mha", embeddings="tied"),
    "mha-untied": small_model(style="llama", attention="mha", embeddings="untied"),
    "gqa-tied": small_model(style="llama", attention="gqa", embeddings="tied"),
    "gqa-untied": small_model(style="gpt", attention="gqa", embeddings="untied"),
    "mqa-tied": small_model(style="gpt", attention="mqa", embeddings="tied"),
    "mqa-untied": small_model(style="llama", attention="mqa", embeddings="untied"),
}

FEATURES: dict[str, ModelConfig] = {
    "gqa-qwen": small_model(style="qwen", attention="gqa", embeddings="untied"),
    "mqa-qwen": small_model(style="qwen", attention="mqa", embeddings="tied"),
}
"""Biases on queries, keys and values alone, norms of heads, scaled rotary positions, a window: all at once."""


@dataclass(frozen=True)
class Case:
    mesh: str
    schedule: str
    num_microbatches: int
    model: str
    remat: Remat = "none"
    num_chunks: int = 1
    vocab: Vocab = "ends"
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        chunks = f"-v{self.num_chunks}" if self.num_chunks > 1 else ""
        stages = f"-layers{'_'.join(map(str, self.layers))}" if self.layers else ""
        ends = "-split" if self.vocab == "split" else ""
        return f"{self.mesh}-{self.schedule}{chunks}-m{self.num_microbatches}-{self.model}-{self.remat}{ends}{stages}"


CASES = (
    Case("1x1x1", "naive", 1, "mha-tied"),
    Case("1x1x1", "1f1b", 3, "gqa-tied", "full"),
    Case("8x1x1", "gpipe", 2, "gqa-untied", "dots"),
    Case("8x1x1", "1f1b", 1, "mqa-tied"),
    Case("1x8x1", "naive", 2, "mqa-untied"),
    Case("1x8x1", "gpipe", 3, "gqa-tied"),
    Case("1x1x8", "naive", 2, "gqa-untied", vocab="split"),
    Case("1x1x8", "gpipe", 1, "mha-untied", "full"),
    Case("1x1x8", "1f1b", 8, "mqa-tied", vocab="split"),
    Case("2x2x2", "naive", 3, "mha-tied"),
    Case("2x2x2", "gpipe", 2, "mqa-untied"),
    Case("2x2x2", "1f1b", 8, "gqa-tied", "dots", vocab="split"),
    Case("1x2x4", "naive", 8, "mha-untied"),
    Case("1x2x4", "gpipe", 3, "mha-tied", vocab="split"),
    Case("1x2x4", "1f1b", 2, "mqa-tied", "full", vocab="split"),
    Case("4x1x2", "naive", 1, "gqa-untied"),
    Case("4x1x2", "gpipe", 2, "mha-tied", "dots", vocab="split"),
    Case("4x1x2", "1f1b", 3, "gqa-tied"),
    Case("1x1x8", "zb-h1", 3, "mha-untied"),
    Case("2x2x2", "zb-h1", 8, "mqa-untied", "dots", vocab="split"),
    Case("1x2x4", "zb-h1", 8, "gqa-untied", vocab="split"),
    Case("4x1x2", "zb-h1", 2, "mha-tied", "full"),
    Case("2x2x2", "interleaved-1f1b", 3, "gqa-untied", "full", num_chunks=4, vocab="split"),
    Case("1x2x4", "interleaved-1f1b", 8, "mqa-tied", num_chunks=2),
    Case("4x1x2", "interleaved-zb-h1", 3, "gqa-tied", num_chunks=4),
    Case("1x2x4", "interleaved-zb-h1", 3, "mqa-untied", "dots", num_chunks=2, vocab="split"),
    Case("2x2x2", "interleaved-zb-h1", 2, "mha-tied", num_chunks=2),
    Case("1x2x4", "1f1b", 8, "mqa-untied", vocab="ends", layers=(1, 3, 2, 2)),
    Case("2x2x2", "gpipe", 3, "gqa-tied", "full", vocab="split", layers=(5, 3)),
    Case("1x2x4", "zb-h1", 3, "mha-tied", vocab="split", layers=(2, 3, 2, 1)),
    Case("4x1x2", "interleaved-1f1b", 3, "mha-untied", "dots", num_chunks=2, vocab="split", layers=(1, 3, 2, 2)),
    Case("2x2x2", "interleaved-zb-h1", 2, "gqa-tied", num_chunks=2, layers=(2, 1, 4, 1)),
    Case("2x2x2", "auto", 3, "mha-untied", vocab="split", layers=(3, 5)),
)

FEATURE_CASES = (Case("2x2x2", "zb-h1", 3, "mqa-qwen"),)
MORE_FEATURE_CASES = (
    Case("1x2x4", "1f1b", 3, "gqa-qwen", "dots", vocab="split"),
    Case("4x1x2", "gpipe", 2, "mqa-qwen", "full", vocab="split"),
    Case("1x8x1", "naive", 2, "gqa-qwen"),
    Case("1x2x4", "zb-h1", 3, "gqa-qwen", "dots"),
)

REMATS = get_args(Remat)
VOCABS = get_args(Vocab)

UNEVEN: dict[int, tuple[int, ...]] = {2: (5, 3), 4: (1, 3, 3, 1)}
"""Eight layers on so many stages."""


def can_run(mesh: str, schedule: str, num_chunks: int) -> bool:
    num_ranks = int(mesh.split("x")[2])
    # On one pipeline rank a schedule gives the number of microbatches alone.
    return schedule == "1f1b" if num_ranks == 1 else num_ranks * num_chunks <= NUM_LAYERS


EVERY_CASE = tuple(
    Case(mesh, schedule, num_microbatches, model, REMATS[number % 3], num_chunks, VOCABS[number // 3 % 2])
    for number, (mesh, (schedule, num_chunks), num_microbatches, model) in enumerate(
        product(MESHES, (*((name, 1) for name in SCHEDULES), *CHUNKED), MICROBATCHES, MODELS)
    )
    if can_run(mesh, schedule, num_chunks)
)


EVERY_UNEVEN_CASE = tuple(
    Case(mesh, schedule, num_microbatches, "gqa-untied", "none", num_chunks, VOCABS[number % 2], layers)
    for number, (mesh, (schedule, num_chunks), num_microbatches) in enumerate(
        product(("2x2x2", "1x2x4", "4x1x2"), (*((name, 1) for name in SCHEDULES), *CHUNKED), MICROBATCHES)
    )
    if (layers := UNEVEN.get(int(mesh.split("x")[2]) * num_chunks))
)


def wrong_by(case: Case) -> dict[str, float]:
    num_data = int(case.mesh.split("x")[0])
    num_sequences = 24 if case.num_microbatches == 3 else max(16, case.num_microbatches * num_data)
    config = (MODELS | FEATURES)[case.model]
    step = pipeline_step(
        config,
        mesh=case.mesh,
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        num_sequences=num_sequences,
        num_chunks=case.num_chunks,
        remat=case.remat,
        vocab=case.vocab,
        layers_per_stage=case.layers,
    )
    return beyond(errors_of(answer_of(step), one_device(config, num_sequences)), tolerance=TOLERANCE)


@pytest.mark.parametrize("case", [*CASES, *FEATURE_CASES], ids=str)
def test_loss_gradients_and_norm_equal_one_device(case: Case) -> None:
    assert wrong_by(case) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*EVERY_CASE, *EVERY_UNEVEN_CASE, *MORE_FEATURE_CASES], ids=str)
def test_loss_gradients_and_norm_equal_one_device_in_the_full_product(case: Case) -> None:
    assert wrong_by(case) == {}


def test_default_cases_hold_every_schedule_on_every_mesh_with_a_pipeline() -> None:
    wanted = {(mesh, schedule) for mesh, schedule in product(MESHES, SCHEDULES) if not mesh.endswith("x1")}
    assert wanted - {(case.mesh, case.schedule) for case in CASES} == set()


def test_default_cases_hold_interleaved_schedules_with_two_and_with_four_chunks() -> None:
    found = {(case.schedule, case.num_chunks) for case in CASES}
    assert set(CHUNKED) - found == set()


@pytest.mark.parametrize("mesh", MESHES)
def test_default_cases_hold_every_mesh_twice(mesh: str) -> None:
    assert sum(case.mesh == mesh for case in CASES) >= 2


def test_default_cases_hold_every_number_of_microbatches_model_and_policy() -> None:
    assert {case.num_microbatches for case in CASES} == set(MICROBATCHES)
    assert {case.model for case in CASES} == set(MODELS)
    assert {case.remat for case in CASES} == set(REMATS)


@pytest.mark.parametrize("vocab", VOCABS)
def test_default_cases_hold_every_schedule_and_unequal_stages_with_either_vocabulary(vocab: Vocab) -> None:
    found = [case for case in CASES if case.vocab == vocab and not case.mesh.endswith("x1")]
    assert {name for name, _ in CHUNKED} | set(SCHEDULES) <= {case.schedule for case in found}
    assert any(case.layers for case in found)


def test_models_hold_every_kind_of_attention_tied_and_untied() -> None:
    kinds = {(config.num_kv_heads, config.embeddings) for config in MODELS.values()}
    assert kinds == set(product(KV_HEADS.values(), ("tied", "untied")))


def test_default_cases_hold_fewer_kv_heads_than_tensor_ranks_in_a_pipeline() -> None:
    few = [case for case in CASES if case.model.startswith("mqa") and case.mesh in ("2x2x2", "1x2x4")]
    assert {case.mesh for case in few} == {"2x2x2", "1x2x4"}
