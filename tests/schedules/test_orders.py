"""Orders become ticks, as early as the executor can run them; orders that wait for each other are refused."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from trellax.meshes import ScheduleError
from trellax.schedules import Action, Schedule, build_schedule, schedule_from_orders, simulate

from .sizes import HALVES, named_schedules

Golden = Callable[[str, str], None]

DEADLOCKS: dict[str, tuple[str, ...]] = {
    "microbatches_in_opposite_orders": ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"),
    "backward_before_forward": ("0F0 0B0", "1B0 1F0"),
    "weight_gradient_before_input_gradient": ("0F0 0I0 0W0", "1F0 1W0 1I0"),
    "chunks_in_the_wrong_order": ("2F0 0F0 0B0 2B0", "1F0 3F0 3B0 1B0"),
    "one_rank_is_done": ("0F0 0I0 0W0", "1F0 1I0 1W0 1W1"),
}

every_size = settings(derandomize=True, deadline=None)


def orders_from_text(*lines: str) -> list[list[Action]]:
    return [[Action.parse(word) for word in line.split()] for line in lines]


def orders_of(schedule: Schedule) -> list[list[Action]]:
    return [[action for _, own, action in schedule.placed() if own == rank] for rank in range(schedule.num_ranks)]


def placed_again(schedule: Schedule) -> Schedule:
    sizes = {"num_microbatches": schedule.num_microbatches, "num_chunks": schedule.num_chunks}
    return schedule_from_orders(orders_of(schedule), name=schedule.name, placement=schedule.placement, **sizes)


@every_size
@given(named_schedules(max_microbatches=16))
def test_placing_the_orders_of_a_schedule_keeps_them(schedule: Schedule) -> None:
    assert orders_of(placed_again(schedule)) == orders_of(schedule)


@every_size
@given(named_schedules(max_microbatches=16))
def test_placing_the_orders_of_a_schedule_is_never_slower(schedule: Schedule) -> None:
    assert simulate(placed_again(schedule)).makespan <= simulate(schedule).makespan


@every_size
@given(named_schedules(HALVES, max_microbatches=16))
def test_halves_are_placed_one_a_tick(schedule: Schedule) -> None:
    assert max(len(cell) for row in placed_again(schedule).ticks for cell in row) == 1


def test_whole_backward_is_placed_beside_a_forward() -> None:
    schedule = build_schedule("1f1b", num_ranks=4, num_microbatches=8)
    assert str(placed_again(schedule)) == str(schedule)


def test_no_action_waits_for_longer_than_it_must() -> None:
    orders = orders_from_text("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1")
    schedule = schedule_from_orders(orders, name="mine", num_microbatches=2)
    grid = "rank 0 | 0F0 0F1   . 0I0 0W0 0I1 0W1\nrank 1 |   . 1F0 1I0 1F1 1I1 1W0 1W1"
    assert str(schedule) == grid


@pytest.mark.parametrize("name", DEADLOCKS)
def test_orders_that_wait_for_each_other_are_refused(name: str, golden: Golden) -> None:
    orders = orders_from_text(*DEADLOCKS[name])
    actions = [action for order in orders for action in order]
    with pytest.raises(ScheduleError) as caught:
        schedule_from_orders(
            orders,
            name="mine",
            num_microbatches=1 + max(action.microbatch for action in actions),
            num_chunks=1 + max(action.stage for action in actions) // len(orders),
        )
    golden(f"errors/pipeline/deadlock_{name}.txt", str(caught.value))


def test_orders_that_lack_an_action_are_refused() -> None:
    with pytest.raises(ScheduleError, match="never runs 0W0"):
        schedule_from_orders(orders_from_text("0F0 0I0"), name="mine", num_microbatches=1)
