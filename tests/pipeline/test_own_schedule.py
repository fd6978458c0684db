"""The executor knows no schedule by name: one written by hand, and one found by `auto`, equal one device too.

They do so with either vocabulary and with stages of unequal depth.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from trellax.schedules import Schedule, Vocab, load_schedule, schedule_from_csv
from trellax.schedules.families.auto import auto

from .law import answer_of, beyond, errors_of, one_device, pipeline_step, small_model

SEQUENCES = 48
"""A number that all these microbatches divide."""

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

TORCH = Path(__file__).parents[1] / "schedules" / "torch"
"""Action lists that torch.distributed.pipelining wrote."""

BY_HAND = """\
0F0,0F1,0F2,,0I0,0F3,0I1,0W1,0W0,0I2,0I3,0W2,0W3
1F0,,1F1,1I0,1F2,1I1,1W0,1W1,1F3,1I2,1I3,1W3,1W2
2F0,2F1,2I0,2W0,2F2,2I1,2W1,2F3,2I2,2W2,2I3,2W3
3F0,3I0,3F1,3I1,3F2,3F3,3W0,3I3,3I2,3W2,3W1,3W3
"""
"""Four ranks, four microbatches, halves, and an order that no builder would give: the last rank swaps 2 and 3."""


@pytest.mark.parametrize(
    ("mesh", "schedule", "vocab", "layers"),
    [
        ("1x2x4", schedule_from_csv(BY_HAND, name="by-hand"), "ends", None),
        pytest.param(
            "2x1x4",
            schedule_from_csv(BY_HAND, name="by-hand", vocab="split"),
            "split",
            (2, 1, 4, 1),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "2x1x4",
            auto(num_ranks=4, num_microbatches=4, max_in_flight=2),
            "ends",
            (1, 2, 2, 3),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "1x1x8",
            auto(num_ranks=8, num_microbatches=4, weight_grad=0.5, vocab="split"),
            "split",
            None,
            marks=pytest.mark.slow,
        ),
        ("2x2x2", auto(num_ranks=2, num_microbatches=4, num_chunks=2), "split", (1, 4, 1, 2)),
        ("1x2x4", load_schedule(TORCH / "zbv_4x8.csv"), "ends", None),
        pytest.param("1x1x4", load_schedule(TORCH / "dualpipev_4x8.csv"), "ends", None, marks=pytest.mark.slow),
        pytest.param(
            "2x1x2", load_schedule(TORCH / "dualpipev_2x6_lowered.csv"), "ends", (2, 3, 1, 2), marks=pytest.mark.slow
        ),
        pytest.param(
            "1x1x4",
            load_schedule(TORCH / "zbv_4x8.csv", vocab="split"),
            "split",
            None,
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        *("by-hand", "by-hand-uneven", "auto-lean", "auto-8", "auto-chunks"),
        *("torch-zbv", "torch-dualpipev", "torch-dualpipev-lowered", "torch-zbv-split"),
    ],
)
def test_schedule_without_a_name_equals_one_device(
    mesh: str, schedule: Schedule, vocab: Vocab, layers: tuple[int, ...] | None
) -> None:
    config = small_model(style="gpt", attention="gqa")
    step = pipeline_step(
        config,
        mesh=mesh,
        schedule=schedule,
        num_microbatches=schedule.num_microbatches,
        num_sequences=SEQUENCES,
        num_chunks=schedule.num_chunks,
        layers_per_stage=layers,
        vocab=vocab,
        bubbles="nan",
    )
    assert beyond(errors_of(answer_of(step), one_device(config, SEQUENCES)), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "zb-h1"])
def test_eight_stages_of_unequal_depth_equal_one_device(schedule: str) -> None:
    config = replace(small_model(style="llama", embeddings="untied"), num_layers=11)
    step = pipeline_step(
        config,
        mesh="1x1x8",
        schedule=schedule,
        num_microbatches=3,
        num_sequences=24,
        layers_per_stage=(1, 1, 1, 1, 2, 2, 2, 1),
        vocab="split",
        bubbles="nan",
    )
    assert beyond(errors_of(answer_of(step), one_device(config, 24)), tolerance=TOLERANCE) == {}
