"""What a schedule sends: an activation and a gradient of every microbatch between stages on two ranks."""

from collections.abc import Callable

from hypothesis import given, settings
from trellax.schedules import Schedule, build_schedule, count_messages
from trellax.schedules.messages import draw_messages

from .sizes import V_SHAPED, named_schedules


@settings(derandomize=True, deadline=None)
@given(named_schedules(max_microbatches=10))
def test_every_crossing_between_ranks_is_sent_once_each_way(schedule: Schedule) -> None:
    ranks = schedule.placement.ranks
    crossings = [stage for stage in range(schedule.num_stages - 1) if ranks[stage] != ranks[stage + 1]]
    sent = sorted((one.kind, one.microbatch, one.from_stage, one.to_stage) for one in schedule.messages())
    expected = [
        message
        for stage in crossings
        for microbatch in range(schedule.num_microbatches)
        for message in (
            ("activation", microbatch, stage, stage + 1),
            ("gradient", microbatch, stage + 1, stage),
        )
    ]
    assert sent == sorted(expected)
    assert count_messages(schedule) == len(expected)


@settings(derandomize=True, deadline=None)
@given(named_schedules(min_ranks=2, max_microbatches=10))
def test_messages_leave_with_their_action_and_arrive_before_their_use(schedule: Schedule) -> None:
    done = {action: (tick, rank) for tick, rank, action in schedule.placed()}
    ticks = {(str(action.stage), action.kind, action.microbatch): tick for action, (tick, _) in done.items()}
    for one in schedule.messages():
        kinds = ("F",) if one.kind == "activation" else ("B", "I")
        sent = [ticks.get((str(one.from_stage), kind, one.microbatch)) for kind in kinds]
        used = [ticks.get((str(one.to_stage), kind, one.microbatch)) for kind in kinds]
        assert one.tick in sent
        assert any(tick is not None and tick > one.tick for tick in used)
        assert (one.sender, one.receiver) == tuple(
            schedule.placement.rank_of(stage) for stage in (one.from_stage, one.to_stage)
        )


@settings(derandomize=True, deadline=None)
@given(named_schedules(V_SHAPED, min_ranks=2))
def test_a_v_sends_to_neighbours_alone_and_nothing_in_its_turn(schedule: Schedule) -> None:
    p = schedule.num_ranks
    assert {abs(one.receiver - one.sender) for one in schedule.messages()} == {1}
    assert all({one.from_stage, one.to_stage} != {p - 1, p} for one in schedule.messages())
    # A loop of as many chunks sends 2 m (2p - 1): its last rank sends to its first.
    assert count_messages(schedule) == 2 * schedule.num_microbatches * (2 * p - 2)


def test_messages_are_drawn_tick_by_tick(golden: Callable[[str, str], None]) -> None:
    schedule = build_schedule("v-min", num_ranks=2, num_microbatches=2, num_chunks=2)
    golden("schedules/v-min_2x2_messages.txt", f"{schedule}\n{draw_messages(schedule.messages())}")


def test_one_rank_sends_nothing() -> None:
    assert draw_messages(build_schedule("gpipe", num_ranks=1, num_microbatches=2).messages()) == (
        "tick  from  to  what  stages"
    )
