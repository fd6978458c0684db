"""Hypothesis strategies of schedules that no builder would make, on any placement."""

from itertools import count, product

from hypothesis import assume
from hypothesis import strategies as st
from trellax.schedules import Action, Kind, Placement, Schedule
from trellax.schedules.check import needs

KINDS: tuple[tuple[Kind, ...], ...] = (("F", "B"), ("F", "I", "W"))
"""With whole backwards, and with halves."""


@st.composite
def placements(draw: st.DrawFn, *, max_ranks: int = 4, max_chunks: int = 3) -> Placement:
    """Loops, Vs and what lies between: each chunk goes over all ranks, up or down."""
    ranks = range(draw(st.integers(2, max_ranks)))
    goes_down = draw(st.lists(st.booleans(), min_size=1, max_size=max_chunks))
    return Placement(tuple(rank for down in goes_down for rank in (reversed(ranks) if down else ranks)))


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """Any order that can run, with up to three chunks: in every tick each rank does some of what it could."""
    placement, num_microbatches = draw(placements()), draw(st.integers(1, 5))
    num_ranks, num_stages = placement.num_ranks, len(placement.ranks)
    rng = draw(st.randoms(use_true_random=False))
    kinds = draw(st.sampled_from(KINDS))
    every = product(range(num_stages), kinds, range(num_microbatches))
    todo = {Action(stage=stage, kind=kind, microbatch=microbatch) for stage, kind, microbatch in every}
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(num_ranks)]
    for tick in count():
        before = frozenset(todo)
        for rank, kind in ((rank, kind) for rank in range(num_ranks) for kind in rng.sample(kinds, len(kinds))):
            own = [action for action in sorted(todo) if placement.ranks[action.stage] == rank and action.kind == kind]
            ready = [action for action in own if _is_ready(action, num_stages, before=before, todo=todo)]
            if ready and rng.random() < 0.8:
                todo.remove(action := rng.choice(ready))
                ticks_of[rank].setdefault(tick, []).append(action)
        if not todo:
            break
    sizes = {"num_microbatches": num_microbatches, "num_chunks": placement.num_chunks}
    return Schedule.from_ticks(ticks_of, name="random", placement=placement, **sizes)


@st.composite
def paired_schedules(draw: st.DrawFn) -> Schedule:
    """A forward beside a whole backward in most ticks, on any placement, with the loss in the tick or one later."""
    placement, num_microbatches = draw(placements(max_chunks=2)), draw(st.integers(4, 12))
    limit, is_delayed = draw(st.integers(2 * len(placement.ranks), 4 * len(placement.ranks))), draw(st.booleans())
    num_stages, every = len(placement.ranks), range(num_microbatches)
    todo = {Action(stage=s, kind=kind, microbatch=k) for s in range(num_stages) for kind in KINDS[0] for k in every}
    ticks_of: list[dict[int, list[Action]]] = [{} for _ in range(placement.num_ranks)]
    held = [0] * placement.num_ranks
    for tick in count():
        before = frozenset(todo)
        for rank, kind in product(range(placement.num_ranks), draw(st.permutations(KINDS[0]))):
            own = sorted(
                (action for action in todo if placement.ranks[action.stage] == rank and action.kind == kind),
                key=lambda action: (action.microbatch, -action.stage),
            )
            is_late = is_delayed and kind == "B"
            seen = before if is_late else todo
            ready = [a for a in own if _is_ready(a, num_stages, before=before, todo=set(seen))]
            if ready and not (kind == "F" and held[rank] >= limit):
                todo.remove(ready[0])
                held[rank] += 1 if kind == "F" else -1
                ticks_of[rank].setdefault(tick, []).append(ready[0])
        if not todo:
            break
        assume(todo != before)
    sizes = {"num_microbatches": num_microbatches, "num_chunks": placement.num_chunks}
    return Schedule.from_ticks(ticks_of, name="paired", placement=placement, **sizes)


def _is_ready(action: Action, num_stages: int, *, before: frozenset[Action], todo: set[Action]) -> bool:
    """Return whether all that an action needs has run: on its own stage by this tick, elsewhere before it."""
    needed = needs(action, num_stages=num_stages, has_halves=action.kind in ("I", "W"))
    return all(other not in (todo if other.stage == action.stage else before) for other in needed)
