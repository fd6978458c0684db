"""A profile that does not fit into its run says so before the first step, and a failing one does not stop the run."""

from pathlib import Path

import pytest
from trellax.train.profile import StepProfile


@pytest.mark.parametrize(
    ("num_steps", "steps", "advice"),
    [(5, 9, "--profile 4, or --train.steps 10"), (5, 7, "--profile 2, or --train.steps 10"), (1, 5, "--train.steps 6")],
)
def test_profile_that_does_not_fit_says_what_would(tmp_path: Path, num_steps: int, steps: int, advice: str) -> None:
    said: list[str] = []
    profile = StepProfile(tmp_path, num_steps=num_steps, say=said.append)
    profile.begin_after(2, steps=steps)
    numbers = f"3 steps to warm up and {num_steps} to trace are more than the {steps - 2} to take"
    assert said == [f"profile   none: {numbers}; ask for {advice}"]
    assert not any(profile.begins_with(step) for step in range(1, steps + 1))


def test_profile_that_just_fits_is_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, num_steps=5, say=pytest.fail)
    profile.begin_after(2, steps=10)
    assert [step for step in range(1, 11) if profile.begins_with(step)] == [6]


def test_run_without_a_profile_says_nothing(tmp_path: Path) -> None:
    StepProfile(tmp_path, num_steps=0, say=pytest.fail).begin_after(0, steps=1)


def test_trace_that_cannot_be_written_is_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "profile").write_text("a file where the folder should be")
    profile = StepProfile(tmp_path, num_steps=1, say=said.append)
    profile.begin_after(0, steps=5)
    profile.start(())
    assert said == ["profile   none: File exists; the run goes on"]
    assert not profile.ends_with(4)


def test_trace_cut_off_by_an_error_is_stopped(tmp_path: Path) -> None:
    for _ in range(2):
        profile = StepProfile(tmp_path, num_steps=1, say=pytest.fail)
        profile.begin_after(0, steps=5)
        profile.start(())
        profile.close()
