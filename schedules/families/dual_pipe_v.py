"""DualPipeV: DualPipe cut in half, every rank with the first chunk of one direction and the last of the other.

DeepSeek's DualPipe sends microbatches through the pipeline from both ends and keeps two copies of the parameters. The
"cut in half" of Sea AI Lab folds it to a V with one copy. In the steady state a rank runs a forward of one chunk beside
a backward of the other, so that the messages of one can travel while the other computes. Rank 1 of 4:

    F0 F0 F0 F0 | F0 F1 F0 F1 | I1 W F1 I1 W F1 | F0 B1 F1 B0 ... | B1 F1 B0 B1 F1 B0 | B1 B0 I1 I0 | W I0 W I0 | W W

Here every whole backward B is written as its two halves, one after the other: a schedule of trellax splits all
backwards or none. Source: github.com/deepseek-ai/DualPipe, README and figure of DualPipeV.
"""

from collections import deque
from collections.abc import Iterator

from ..action import Action, Kind
from ..check import check_sizes
from ..family import Family
from ..formula import dual_pipe_bubble
from ..orders import fill_ticks
from ..placement import Placement
from ..schedule import Schedule


def dual_pipe_v(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule of two chunks a rank, in a V, with forwards of one chunk beside backwards of the other.

    In flight: 2p + 1 microbatches of a chunk on every rank. With F = I = W and m >= 2p it takes 6m + p - 1 ticks of one
    chunk. It is made for that many; with fewer, the actions of the others are left out.

    Raises:
        ScheduleError: a count is below 1.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    placement = Placement.of("v", num_ranks=num_ranks, num_chunks=2)
    most = max(num_microbatches, 2 * num_ranks)
    orders = [
        [action for action in _order_of_rank(rank, placement, most) if action.microbatch < num_microbatches]
        for rank in range(num_ranks)
    ]
    return Schedule(
        name="dualpipev",
        num_ranks=num_ranks,
        num_chunks=2,
        placement=placement,
        num_microbatches=num_microbatches,
        ticks=fill_ticks(orders, width=1, num_chunks=2, name="dualpipev"),
    )


def _order_of_rank(rank: int, placement: Placement, num_microbatches: int) -> Iterator[Action]:
    """Yield a rank's actions; microbatches of a chunk come in order, and W is always of the oldest I without one."""
    stages, count = placement.stages_of(rank), [{"F": 0, "I": 0}, {"F": 0, "I": 0}]
    waiting: deque[Action] = deque()
    for word in _words(placement.num_ranks - 1 - rank, rank + 1, num_microbatches):
        if word == "W":
            yield waiting.popleft()
            continue
        kind: Kind = "F" if word[0] == "F" else "I"
        chunk = int(word[1])
        action = Action(stage=stages[chunk], kind=kind, microbatch=count[chunk][kind])
        count[chunk][kind] += 1
        if kind == "I":
            waiting.append(Action(stage=action.stage, kind="W", microbatch=action.microbatch))
        yield action
    yield from waiting


def _words(after: int, until: int, num_microbatches: int) -> list[str]:
    """Return the kinds and chunks of a rank's actions, given the ranks after it and those up to it."""
    num_pairs = num_microbatches - 2 * after - until
    backwards = ["I1", "I0"] * until
    return [
        *["F0"] * (2 * after),
        *["F0", "F1"] * until,
        *["I1", "W", "F1"] * after,
        *["F0", "I1", "W", "F1", "I0", "W"] * num_pairs,
        *["I1", "W", "F1", "I0", "W"] * after,
        # The first half whole, the second without weight gradients, which fill the gaps at the end.
        *[word for backward in backwards[:until] for word in (backward, "W")],
        *backwards[until:],
        *["W", "I0"] * after,
    ]


DUAL_PIPE_V = Family(
    name="dualpipev",
    build=dual_pipe_v,
    chunks="two",
    placement="v",
    backward="split",
    peak_in_flight=lambda num_ranks, _chunks, _vocab: 2 * num_ranks + 1,
    bubble=dual_pipe_bubble,
)
