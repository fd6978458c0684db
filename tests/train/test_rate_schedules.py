"""The learning rate follows a schedule of optax that a config calls by name, also after a resume."""

from pathlib import Path
from typing import Any

import optax
import pytest
from trellax.configs import load_config
from trellax.configs.rate_schedules import make_optax_schedule, optax_schedules
from trellax.meshes import ConfigError
from trellax.train import make_learning_rate, train
from trellax.train.metrics import read_metrics
from trellax.train.update.optimizer import check_rates

CALLS: dict[str, Any] = {
    "constant_schedule(0.5)": lambda: optax.constant_schedule(0.5),
    "polynomial_schedule(init_value=1.0, end_value=0.1, power=2, transition_steps=12)": lambda: (
        optax.polynomial_schedule(1.0, 0.1, 2, 12)
    ),
    "exponential_decay(1, 4, 0.5, staircase=True)": lambda: optax.exponential_decay(1, 4, 0.5, staircase=True),
    "piecewise_constant_schedule(1.0, {3: 0.5, 9: 0.1})": lambda: optax.piecewise_constant_schedule(
        1.0, {3: 0.5, 9: 0.1}
    ),
    "piecewise_interpolate_schedule('linear', 1.0, {4: 0.5})": lambda: optax.piecewise_interpolate_schedule(
        "linear", 1.0, {4: 0.5}
    ),
    "linear_onecycle_schedule(20, 1.0)": lambda: optax.linear_onecycle_schedule(20, 1.0),
    "join_schedules([linear_schedule(0.2, 1.0, 5), cosine_decay_schedule(1.0, 10)], boundaries=[5])": lambda: (
        optax.join_schedules([optax.linear_schedule(0.2, 1.0, 5), optax.cosine_decay_schedule(1.0, 10)], [5])
    ),
    "sgdr_schedule([{'init_value': 0.1, 'peak_value': 1.0, 'warmup_steps': 2, 'decay_steps': 6}])": lambda: (
        optax.sgdr_schedule([{"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 6}])
    ),
}


def section_of(schedule: str, *words: str) -> Any:
    return load_config("tiny-dense", ["--optimizer.lr_schedule", schedule, *words]).optimizer


@pytest.mark.parametrize("text", CALLS)
def test_rate_is_what_optax_returns_in_each_step(text: str) -> None:
    own, wanted = make_optax_schedule(text), CALLS[text]()
    assert [float(own(step)) for step in range(0, 20, 3)] == [float(wanted(step)) for step in range(0, 20, 3)]


def test_rate_is_a_share_of_the_peak_after_the_warm_up() -> None:
    words = ("--optimizer.warmup_steps=3", "--optimizer.learning_rate=0.02")
    rate = make_learning_rate(section_of("exponential_decay(1.0, 1, 0.5)", *words), steps=20)
    shares = [0.25, 0.5, 0.75, 1.0, 0.5, 0.25]
    assert [float(rate(step)) for step in range(6)] == pytest.approx([0.02 * share for share in shares])


def test_every_factory_of_optax_is_known() -> None:
    named = {name for name in dir(optax) if name.endswith(("_schedule", "_decay", "_schedules"))}
    # Deprecated names of what is no schedule of a rate.
    assert named - set(optax_schedules()) <= {"scale_by_schedule"}
    assert "inject_hyperparams" not in optax_schedules()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear_schedule(1.0, -1.0, 10)", r"is -0.* in step 6 of train.steps=20"),
        ("constant_schedule(0.0)", "is 0 in all steps to train.steps=20"),
        ("join_schedules(3, boundaries=[1])", "optax cannot compute it: "),
        ("constant_schedule(1e999)", "is inf in step 0"),
        ("polynomial_schedule(1.0, 0.0, -1, 10)", "is inf in step 10"),
    ],
)
def test_rate_that_cannot_be_is_refused_before_a_run(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_rates(section_of(text, "--optimizer.warmup_steps=0"), steps=20)


def test_call_may_be_longer_than_a_name() -> None:
    parts = ", ".join(["linear_schedule(init_value=1.0, end_value=0.5, transition_steps=10)"] * 9)
    text = f"join_schedules([{parts}], boundaries={list(range(10, 90, 10))})"
    rate = make_learning_rate(section_of(text, "--optimizer.warmup_steps=0"), steps=90, peak=1.0)
    assert [float(rate(step)) for step in (0, 5, 85)] == pytest.approx([1.0, 0.75, 0.75])
    nested = "join_schedules([" * 200 + "1" + "], [1])" * 200
    with pytest.raises(ConfigError):
        make_optax_schedule(nested)


@pytest.mark.slow
def test_run_logs_the_rates_of_optax_and_goes_on_with_them(tmp_path: Path) -> None:
    """Cut after three of six steps, and gone on on another mesh."""
    text = "polynomial_schedule(init_value=1.0, end_value=0.1, power=2, transition_steps=6)"
    words = ["--optimizer.lr_schedule", text, "--optimizer.warmup_steps=0", f"--run.folder={tmp_path}"]
    words += ["--train.log_every=1", "--run.name=run", "--optimizer.learning_rate=0.01", "--train.batch_size=8"]
    for mesh, steps in (("--mesh.data=8", 3), ("--mesh.data=4 --mesh.pipe=2", 6)):
        config = load_config("tiny-dense", [*words, *mesh.split(), f"--train.steps={steps}"])
        train(config, changes="accept")
    rates = [line["lr"] for line in read_metrics(config.run_folder) if "lr" in line]
    wanted: Any = optax.polynomial_schedule(0.01, 0.001, 2, 6)
    assert rates == pytest.approx([float(wanted(step)) for step in range(6)], rel=1e-6)
