"""On GPUs an action has a branch for each chunk; the same program, made here for CPUs, equals one device."""

from typing import Literal

import pytest

from .law import broken, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason


@pytest.mark.parametrize(
    ("mesh", "schedule", "microbatches", "overlap"),
    [
        ("2x1x2", "interleaved-1f1b", 6, "on"),
        ("1x2x2", "zb-v", 5, "off"),
        pytest.param("1x2x4", "v-half", 6, "off", marks=pytest.mark.slow),
        pytest.param("2x1x4", "interleaved-1f1b", 9, "off", marks=pytest.mark.slow),
    ],
)
def test_branches_for_each_chunk_equal_one_device(
    mesh: str, schedule: str, microbatches: int, overlap: Literal["on", "off"], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("trellax.pipeline.executor.execute.is_nvidia", lambda: asked.append(1) or True)
    config = small_model(style="llama", embeddings="untied")
    sizes = {"num_microbatches": microbatches, "num_sequences": 4 * microbatches, "num_chunks": 2}
    step = {"mesh": mesh, "schedule": schedule, "overlap": overlap, "bubbles": "nan", **sizes}
    assert broken(config, tolerance=TOLERANCE, **step) == {}
    assert asked
