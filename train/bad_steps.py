"""Skip bad steps or stop the run: steps whose loss or gradient is not finite, or whose loss is a spike.

The jitted step has already left out the update (`step_health.py`). The host reads its metrics here, and skips or stops.
"""

import math
from collections.abc import Callable

from ..configs.run_config import RunConfig
from ..meshes import RunError
from .saver import StateSaver
from .state import TrainState
from .step import StepMetrics

_MAX_SKIPPED_IN_A_ROW = 10
"""Largest number of bad steps in a row to skip: more are not caused by a single bad batch, so the run stops."""


class BadSteps:
    """Count bad steps in a row, and skip each or stop the run, as `train.bad_step` says."""

    def __init__(self, config: RunConfig, *, saver: StateSaver, say: Callable[[str], object]) -> None:
        self._config, self._saver, self._say = config, saver, say
        self._in_a_row = 0

    def check(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        """Check the metrics of a step; return if it was good, or is skipped.

        Args:
            state: the newest state, in which the update of the bad step was left out.

        Raises:
            RunError: bad steps stop the run, or there were too many in a row; the state is saved first.
            CheckpointError: the state cannot be saved.
        """
        if bool(metrics.taken):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        problem = describe_bad_step(step, metrics, spike_ratio=self._config.train.spike_ratio)
        if self._config.train.bad_step == "skip" and self._in_a_row <= _MAX_SKIPPED_IN_A_ROW:
            self._say(f"{problem}; the batch is left out")
            return
        saved = self._saver.save_and_wait(state)
        again = f", and {self._in_a_row - 1} steps before it were bad too" if self._in_a_row > 1 else ""
        raise RunError(
            f"{problem}{again}. Its update was left out; the state before it is saved as step "
            f"{saved} in {self._config.run_folder}.",
            fix=fix_bad_step(metrics),
        )


def describe_bad_step(step: int, metrics: StepMetrics, *, spike_ratio: float) -> str:
    """Return what is wrong with a step whose update was left out."""
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    if not _is_spike(metrics):
        return f"step {step}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}"
    mean = float(metrics.mean_loss)
    return (
        f"step {step}: the loss of {loss:.4g} is a spike, {loss / mean:.4g} times its running mean of {mean:.4g}; "
        f"train.spike_ratio={spike_ratio:g} is the limit"
    )


def fix_bad_step(metrics: StepMetrics) -> str:
    """Return how to continue a run that a bad step has stopped."""
    higher = " or a higher --train.spike_ratio" if _is_spike(metrics) else ""
    return (
        f"go on with a lower --optimizer.learning_rate{higher} and --override, or with --train.bad_step skip, which "
        "leaves such batches out."
    )


def _is_spike(metrics: StepMetrics) -> bool:
    # A step whose numbers are all finite can only be bad as a spike.
    return math.isfinite(float(metrics.loss)) and math.isfinite(float(metrics.grad_norm))
