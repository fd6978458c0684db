"""What to say of a loss that must not be built on, of a step or of the last validation. `health.py` finds the steps."""

import math
from pathlib import Path

from ..meshes import RunError
from .step import StepMetrics


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
    """Return how a run goes on that such a step has stopped."""
    higher = " or a higher --train.spike_ratio" if _is_spike(metrics) else ""
    return (
        f"go on with a lower --optimizer.learning_rate{higher} and --override, or with --train.bad_step skip, which "
        "leaves such batches out."
    )


def check_last_validation(loss: float | None, *, step: int, folder: Path) -> None:
    """Raise if the last validation says that the saved parameters are no model; None was not validated.

    Raises:
        RunError: the loss is not finite.
    """
    if loss is None or math.isfinite(loss):
        return
    raise RunError(
        f"the validation loss after the last step, {step}, is {loss:.4g}: its update broke the parameters. They "
        f"are saved as step {step} in {folder}.",
        fix="start over with a lower --optimizer.learning_rate, --fresh and --force, which keeps what is there.",
    )


def _is_spike(metrics: StepMetrics) -> bool:
    # What is not finite is always bad; what is finite can be bad for no other reason.
    return math.isfinite(float(metrics.loss)) and math.isfinite(float(metrics.grad_norm))
