"""V-shaped schedules equal one device: loss, gradients and norm, with NaN in the bubbles."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
from trellax.schedules import Vocab

from .law import broken, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipev")

UNEVEN = {2: (1, 3, 2, 2), 4: (1, 2, 1, 1, 1, 1, 2, 1)}
"""Layers of each stage, by ranks."""


@dataclass(frozen=True)
class Case:
    schedule: str
    mesh: str
    num_microbatches: int
    embeddings: Literal["tied", "untied"]
    vocab: Vocab
    is_even: bool = True

    def __str__(self) -> str:
        stages = "even" if self.is_even else "uneven"
        return f"{self.mesh}-{self.schedule}-m{self.num_microbatches}-{self.embeddings}-{self.vocab}-{stages}"


CASES = (
    Case("zb-v", "1x2x2", 4, "tied", "ends"),
    Case("v-half", "2x1x4", 3, "untied", "split"),
    Case("v-min", "2x2x2", 5, "untied", "split", is_even=False),
    Case("dualpipev", "1x1x4", 8, "tied", "ends", is_even=False),
)

MORE_CASES = tuple(
    case
    for name in V_SHAPED
    for case in (
        Case(name, "2x2x2", 2, "tied", "split"),
        Case(name, "1x2x4", 6, "untied", "ends"),
        Case(name, "1x2x4", 16, "tied", "split", is_even=False),
        Case(name, "2x1x4", 24, "tied", "ends"),
        Case(name, "1x1x8", 3, "untied", "split"),
        Case(name, "1x1x8", 24, "tied", "ends"),
        Case(name, "2x2x2", 24, "untied", "ends", is_even=False),
    )
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_v_shaped_schedule_equals_one_device(case: Case) -> None:
    num_ranks = int(case.mesh.split("x")[-1])
    counts = None if case.is_even else UNEVEN[num_ranks]
    base = small_model(style="llama", attention="gqa", embeddings=case.embeddings)
    config = replace(base, num_layers=sum(counts) if counts else 2 * num_ranks)
    found = broken(
        config,
        tolerance=TOLERANCE,
        mesh=case.mesh,
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        num_sequences=4 * case.num_microbatches,
        num_chunks=2,
        layers_per_stage=counts,
        vocab=case.vocab,
        bubbles="nan",
    )
    assert found == {}
