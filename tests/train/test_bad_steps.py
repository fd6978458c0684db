"""A bad step is described with its numbers, and with what they were compared with."""

import jax.numpy as jnp
import pytest
from trellax.train import StepMetrics
from trellax.train.bad_steps import describe_bad_step, fix_bad_step


def make_metrics(*, loss: float, grad_norm: float = 3.0) -> StepMetrics:
    numbers = {"loss": loss, "grad_norm": grad_norm, "lr": 0.1, "mean_loss": 2.5}
    return StepMetrics(**{name: jnp.float32(value) for name, value in numbers.items()}, taken=jnp.bool_(False))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "text", "has_ratio"),
    [
        (
            10.0,
            3.0,
            "step 7: the loss of 10 is a spike, 4 times its running mean of 2.5; train.spike_ratio=1.5 is the limit",
            True,
        ),
        (float("nan"), 3.0, "step 7: the loss is nan, the gradient's norm 3", False),
        (2.0, float("inf"), "step 7: the loss is 2, the gradient's norm inf", False),
    ],
)
def test_bad_step_is_described_by_its_numbers(loss: float, grad_norm: float, text: str, has_ratio: bool) -> None:
    metrics = make_metrics(loss=loss, grad_norm=grad_norm)
    assert describe_bad_step(7, metrics, spike_ratio=1.5) == text
    assert ("a higher --train.spike_ratio" in fix_bad_step(metrics)) == has_ratio
