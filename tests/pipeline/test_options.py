"""Choices of a few architectures equal one device on any mesh, in any schedule, with every way of splitting tokens."""

from dataclasses import replace
from typing import Any

import pytest

from ..layers.options.variants import VARIANTS
from .law import Attention, broken, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

STEPS: dict[str, dict[str, Any]] = {
    "sequence": {"mesh": "2x2x2", "sequence": "on", "shard": "layer", "remat": "dots"},
    "split backward": {"mesh": "1x4x2", "schedule": "zb-h1", "vocab": "split"},
    "gathered keys": {"mesh": "context=2,tensor=2,pipe=2", "sequence": "on", "context": "gather", "remat": "full"},
    "exchanged heads": {"mesh": "context=2,tensor=2,pipe=2", "context": "ulysses", "remat": "dots"},
}
CASES = [(name, how) for name in VARIANTS for how in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
def test_choices_equal_one_device(name: str, how: str) -> None:
    kv_heads: Attention = "gqa" if how == "exchanged heads" else "mqa"
    config = replace(small_model(style="llama", attention=kv_heads), num_layers=4, **VARIANTS[name])
    step = {"schedule": "1f1b", "num_microbatches": 2, "bubbles": "nan"} | STEPS[how]
    assert broken(config, tolerance=TOLERANCE, num_sequences=8, **step) == {}
