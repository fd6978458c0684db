"""Decide when a rank gathers the whole weights of a chunk, where devices keep parts of them, and how long it has them.

Actions of one kind come in runs on the same chunk: interleaved 1F1B with 4 ranks runs four microbatches through a chunk
before it takes the next. A rank has a slot for each chunk that some run is at work on, and gathers it before an action:

    rank 0, 3 chunks    turns  0-3  4-7  8-11  12-16  17-20  21-24  25-28
    forwards                    a    b    c      a      a      b      b
    backwards                                           c      c      b
    slot 0                      a=========================|b=============
    slot 1                          |b==|c===================|

A slot is given up when an action of another chunk needs one, by the chunk whose next action is farthest (Belady 1966,
"A study of replacement algorithms for a virtual-storage computer": the fewest gathers that so many slots allow). So a
parameter is gathered about 2 m / p times in place of 2 m. `pipeline/lowering` makes columns of it.
"""

from collections.abc import Sequence
from itertools import groupby

from .action import Kind
from .schedule import Schedule

Uses = Sequence[tuple[int, Kind, int]]
"""The actions of one rank in order: turn, kind and chunk."""


def count_slots(uses: Uses) -> int:
    """Return the most chunks that runs of one rank's actions are at work on at a time.

    >>> count_slots([(0, "F", 0), (1, "F", 0), (2, "F", 1), (3, "B", 1)])
    1
    >>> count_slots([(0, "F", 0), (1, "B", 1), (2, "F", 0), (3, "B", 1)])
    2
    """
    spans: list[tuple[int, int, int]] = []
    for kind in sorted({kind for _, kind, _ in uses}):
        own = [use for use in uses if use[1] == kind]
        for chunk, run in groupby(own, key=lambda use: use[2]):
            turns = [turn for turn, _, _ in run]
            spans.append((turns[0], turns[-1], chunk))
    return max(len({chunk for first, last, chunk in spans if first <= turn <= last}) for turn, _, _ in uses)


def find_stays(uses: Uses, *, num_slots: int) -> list[list[int]]:
    """Return the turns of the actions that read a chunk from its slot, for each time that it is gathered into one.

    >>> find_stays([(0, "F", 0), (1, "F", 1), (2, "F", 0)], num_slots=1)
    [[0], [1], [2]]
    >>> find_stays([(0, "F", 0), (1, "F", 1), (2, "F", 0)], num_slots=2)
    [[0, 2], [1]]
    """
    stays: list[list[int]] = []
    present: dict[int, list[int]] = {}
    for position, (turn, _, chunk) in enumerate(uses):
        if chunk not in present:
            if len(present) == num_slots:
                later = [own for _, _, own in uses[position:]]
                present.pop(max(present, key=lambda own: later.index(own) if own in later else len(later)))
            stays.append(present.setdefault(chunk, []))
        present[chunk].append(turn)
    return stays


def uses_of(schedule: Schedule) -> list[list[tuple[int, Kind, int]]]:
    """Return the actions of each rank in order, numbered: what `count_slots` and `find_stays` ask for."""
    uses: list[list[tuple[int, Kind, int]]] = [[] for _ in range(schedule.num_ranks)]
    for _, rank, action in schedule.placed():
        uses[rank].append((len(uses[rank]), action.kind, schedule.placement.chunk_of(action.stage)))
    return uses


def count_gathers(schedule: Schedule) -> tuple[int, int]:
    """Return the slots for whole chunks of a rank, and the most chunks that a rank gathers in a step."""
    uses = uses_of(schedule)
    num_slots = max(map(count_slots, uses))
    return num_slots, max(len(find_stays(own, num_slots=num_slots)) for own in uses)
