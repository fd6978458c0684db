"""An action is written and read as stage, kind, microbatch."""

from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import Action, Kind

Golden = Callable[[str, str], None]
COUNTS = st.integers(0, 1000)

NO_ACTIONS = {
    "word": "forward",
    "unknown_kind": "2X0",
    "no_microbatch": "2F",
    "no_stage": "F0",
    "two_actions": "0F0 1F0",
}


def test_action_prints_as_stage_kind_microbatch() -> None:
    assert str(Action(stage=2, kind="F", microbatch=13)) == "2F13"


@settings(derandomize=True, deadline=None)
@given(stage=COUNTS, kind=st.sampled_from(get_args(Kind)), microbatch=COUNTS)
def test_action_survives_a_round_trip_through_text(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage=stage, kind=kind, microbatch=microbatch)
    assert Action.parse(str(action)) == action


def test_space_around_an_action_is_ignored() -> None:
    assert Action.parse(" 0B3\n") == Action(stage=0, kind="B", microbatch=3)


@pytest.mark.parametrize("name", NO_ACTIONS)
def test_text_that_is_not_an_action_is_refused(name: str, golden: Golden) -> None:
    with pytest.raises(ScheduleError) as caught:
        Action.parse(NO_ACTIONS[name])
    golden(f"errors/pipeline/action_{name}.txt", str(caught.value))
