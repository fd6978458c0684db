"""Measure training steps of a config on random tokens, beside what the planner predicts for the same machine."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import numpy as np

from ...configs.layout import layout_of, question_of
from ...plan.machines.topology import Topology
from ...plan.training_search import price_layout
from ...train.data.prefetch import place_batch
from ...train.state import Setup
from ..inspect_step import compile_step

_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Seconds of a training step: the median of five measured, their range over it, and the prediction."""

    measured_s: float
    spread: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1


def measure_step(setup: Setup, *, topology: Topology) -> MeasuredStep:
    """Compile and run a few training steps, and return their time beside the planner's.

    Raises:
        TrellaxError: the step does not compile, or the layout cannot be priced.
    """
    compiled, _ = compile_step(setup)
    state, rate = setup.init_state(), setup.peak_rate
    batch = place_batch(_draw_batch(setup), setup.batch_sharding)
    times = []
    # The first step warms up, and is not counted.
    for _ in range(_STEPS + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, rate))
        times.append(time.perf_counter() - began)
    middle = median(times[1:])
    layout = layout_of(setup.config, num_devices=topology.num_devices)
    predicted = price_layout(question_of(setup.config, topology=topology), layout)
    spread = (max(times[1:]) - min(times[1:])) / middle
    return MeasuredStep(measured_s=middle, spread=spread, predicted_s=predicted.time_s)


def _draw_batch(setup: Setup) -> dict[str, Any]:
    """Return random tokens, each of which counts, as one batch."""
    generator, most = np.random.default_rng(0), setup.config.model.vocab_size
    drawn = {}
    for name, shape in setup.batch_shapes.items():
        is_tokens = np.issubdtype(shape.dtype, np.integer) and name in ("tokens", "targets")
        drawn[name] = (generator.integers(0, most, shape.shape) if is_tokens else np.ones(shape.shape)).astype(
            shape.dtype
        )
    return drawn
