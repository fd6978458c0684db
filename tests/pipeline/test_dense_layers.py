"""A model whose first layers are dense and whose others have experts equals one device, wherever stages are cut."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from trellax.layers import ModelConfig
from trellax.meshes import ModelError

from .law import answer_of, beyond, broken, errors_of, natural_params, pipeline_step
from .packed import attended_one_by_one, packed_batch
from .test_experts import TOLERANCE, experts


def mixed(*, dense: int = 3, **more: Any) -> ModelConfig:
    """Eight layers, of which the first three have no experts; another width than that of the experts."""
    return replace(experts(**more), dense_layers=dense, ffn_size=96)


@dataclass(frozen=True)
class Case:
    """`layers` are those of each stage, equal ones if empty."""

    mesh: str
    schedule: str
    microbatches: int = 2
    layers: tuple[int, ...] = ()
    sequence: Literal["on", "off"] = "off"
    shard: Literal["none", "step", "chunk", "layer"] = "none"
    vocab: Literal["ends", "split"] = "ends"

    def __str__(self) -> str:
        shard = f"-{self.shard}" * (self.shard != "none")
        return f"{self.mesh}-{self.schedule}-m{self.microbatches}-{self.layers or 'equal'}-{self.vocab}{shard}"


CASES = (Case("expert=2,tensor=2,pipe=2", "1f1b", sequence="on"),)

MORE_CASES = (
    Case("data=2,pipe=4", "zb-h1", 5, layers=(1, 3, 2, 2)),
    Case("1x1x1", "1f1b"),
    Case("1x1x8", "1f1b", 3, vocab="split"),
    Case("2x2x2", "1f1b", 3, layers=(5, 3), vocab="split"),
    Case("expert=2,pipe=4", "1f1b", 4, layers=(4, 2, 1, 1)),
    Case("data=2,expert=2,tensor=2", "1f1b", sequence="on", shard="layer"),
    Case("data=2,expert=2,pipe=2", "1f1b", 4, shard="layer"),
    Case("data=2,tensor=2,pipe=2", "zb-h1", 3, sequence="on", shard="step"),
    Case("expert=2,tensor=2,pipe=2", "interleaved-1f1b", 4, layers=(2, 1, 2, 3)),
    Case("data=2,expert=2,pipe=2", "zb-v", 3, layers=(2, 2, 1, 3)),
    Case("data=2,expert=2,pipe=2", "zb-v", 3, layers=(2, 2, 1, 3), shard="chunk"),
    Case("expert=4,pipe=2", "v-half", 4, layers=(1, 3, 3, 1)),
    Case("context=2,expert=2,pipe=2", "1f1b", 2),
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_dense_layers_before_experts_equal_one_device(case: Case) -> None:
    step = {"mesh": case.mesh, "schedule": case.schedule, "sequence": case.sequence, "shard": case.shard}
    step |= {"layers_per_stage": case.layers or None, "vocab": case.vocab}
    num_chunks = 2 if case.schedule in ("zb-v", "v-half", "interleaved-1f1b") else 1
    sizes = {"num_microbatches": case.microbatches, "num_sequences": 8 * case.microbatches, "num_chunks": num_chunks}
    assert broken(mixed(), tolerance=TOLERANCE, bubbles="nan", **step, **sizes) == {}


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        pytest.param("expert=2,pipe=2", "1f1b", marks=pytest.mark.slow),
        pytest.param("context=2,expert=2,pipe=2", "1f1b", marks=pytest.mark.slow),
        pytest.param("data=2,tensor=2,pipe=2", "zb-h1", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_equal_attention_to_each_by_itself(mesh: str, schedule: str) -> None:
    """With the balance loss of sequences that hold several documents."""
    sizes: dict[str, Any] = {"mesh": mesh, "schedule": schedule, "num_microbatches": 2, "num_sequences": 8}
    actual = answer_of(pipeline_step(mixed(), batch=packed_batch(8), bubbles="nan", **sizes))
    assert beyond(errors_of(actual, attended_one_by_one(mixed(), 8)), tolerance=TOLERANCE) == {}


def test_each_kind_has_parameters_of_its_own() -> None:
    blocks = natural_params(mixed())["blocks"]
    assert blocks["dense"]["mlp"]["up"]["kernel"].shape == (3, 64, 96)
    assert blocks["experts"]["mlp"]["up"]["kernel"].shape == (5, 8, 64, 64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dense_layers": 8}, "dense_layers=8 of num_layers=8: no layer is left for the experts"),
        ({"dense_layers": -1}, "dense_layers=-1 is negative"),
        ({"num_experts": 0, "experts_per_token": 0, "expert_size": 0}, "dense_layers=3, but num_experts=0"),
    ],
    ids=str,
)
def test_dense_layers_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        replace(mixed(shared=0), balance_loss=0.0, router_z_loss=0.0, **change)
