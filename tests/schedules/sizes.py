"""Hypothesis strategies of this folder: named schedules in random sizes."""

from hypothesis import strategies as st
from trellax.schedules import SCHEDULES, Schedule, build_schedule

WHOLE = ("naive", "gpipe", "1f1b", "interleaved-1f1b")
"""Schedules whose backwards are whole."""

V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipev")
"""Schedules of two chunks that are placed in a V, with split backwards."""

HALVES = ("zb-h1", "interleaved-zb-h1", *V_SHAPED)
"""Schedules with split backwards, I and W."""


@st.composite
def named_schedules(
    draw: st.DrawFn,
    names: tuple[str, ...] = (*WHOLE, *HALVES),
    *,
    min_ranks: int = 1,
    max_ranks: int = 8,
    max_chunks: int = 4,
    max_microbatches: int = 32,
) -> Schedule:
    """Any named schedule; fewer microbatches than ranks, and numbers that ranks do not divide, are among them."""
    name = draw(st.sampled_from(names))
    family = SCHEDULES[name]
    num_chunks = draw(st.integers(2, max_chunks)) if family.chunks == "several" else family.default_chunks
    return build_schedule(
        name,
        num_ranks=draw(st.integers(min_ranks, max_ranks)),
        num_microbatches=draw(st.integers(1, max_microbatches)),
        num_chunks=num_chunks,
    )
