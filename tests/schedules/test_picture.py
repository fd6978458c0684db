"""Pictures and traces show every action where the simulation puts it."""

import base64
import itertools
import json
import struct
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.schedules import (
    SCHEDULES,
    Clock,
    Schedule,
    build_schedule,
    count_messages,
    draw_picture,
    simulate,
    time_actions,
    trace_from_schedule,
)
from trellax.schedules.check import needs
from trellax.schedules.picture import peak_text

SVG = "{http://www.w3.org/2000/svg}"
CLOCKS: tuple[Clock, ...] = ("lockstep", "async")
NAMES = [name for name in SCHEDULES if name != "auto"]


def build(name: str, ranks: int = 4, microbatches: int = 8) -> Schedule:
    num_chunks = SCHEDULES[name].default_chunks
    return build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=num_chunks)


def texts_of(svg: bytes) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@settings(derandomize=True, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    ranks=st.integers(1, 6),
    microbatches=st.integers(1, 12),
    clock=st.sampled_from(CLOCKS),
    transfer=st.sampled_from((0.0, 0.3)),
)
def test_spans_of_a_rank_follow_each_other_and_their_needs(
    name: str, ranks: int, microbatches: int, clock: Clock, transfer: float
) -> None:
    schedule = build(name, ranks, microbatches)
    spans = time_actions(schedule, clock=clock, weight_grad=0.7, transfer=transfer)
    assert sorted(span.action for span in spans) == sorted(action for _, _, action in schedule.placed())
    by_action = {span.action: span for span in spans}
    has_halves = any(span.action.kind == "I" for span in spans)
    for rank in range(ranks):
        mine = [span for span in spans if span.rank == rank]
        assert all(before.end <= after.start + 1e-9 for before, after in itertools.pairwise(mine))
    for span in spans:
        for needed in needs(span.action, num_stages=schedule.num_stages, has_halves=has_halves):
            hop = transfer if by_action[needed].rank != span.rank else 0.0
            assert by_action[needed].end + hop <= span.start + 1e-9


def test_messages_are_the_crossings_between_stages() -> None:
    assert [count_messages(build(name)) for name in ("gpipe", "interleaved-zb-h1")] == [2 * 8 * 3, 2 * 8 * 7]
    assert count_messages(build("zb-v")) == 2 * 8 * 6
    assert count_messages(build("interleaved-1f1b", ranks=1)) == 0


@pytest.mark.parametrize("clock", CLOCKS)
def test_picture_has_a_number_for_every_action_and_its_bubble_in_the_title(clock: Clock) -> None:
    schedule = build("zb-h1")
    texts = texts_of(draw_picture(schedule, format="svg", clock=clock))
    assert texts.count("7") >= 3 * 4
    title = " ".join(texts)
    assert f"zb-h1: 4 ranks, 8 microbatches, {clock} clock" in title
    assert f"bubble {simulate(schedule, clock=clock).bubble_fraction:.1%}, peak in flight 4, 4, 4, 4" in title


def test_legend_names_the_chunks() -> None:
    texts = texts_of(draw_picture(build("interleaved-1f1b"), format="svg"))
    assert [text for text in texts if "chunk " in text] == [
        "forward, chunk 0",
        "forward, chunk 1",
        "backward, chunk 0",
        "backward, chunk 1",
    ]


def test_picture_grows_so_that_8_ranks_and_32_microbatches_can_be_read() -> None:
    png = draw_picture(build("1f1b", 8, 32))
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG")
    # 117 units of time, each wide enough for two digits.
    assert width > 117 * 25
    assert height > 8 * 50


def test_picture_is_the_same_every_time() -> None:
    schedule = build("gpipe")
    assert draw_picture(schedule, format="svg") == draw_picture(schedule, format="svg")


def test_notebook_shows_the_picture() -> None:
    schedule = build("zb-h1")
    html = schedule._repr_html_()
    picture = base64.b64decode(html.partition("base64,")[2].removesuffix('">'))
    assert html.startswith('<img alt="zb-h1: 4 ranks, 8 microbatches" ')
    assert picture == draw_picture(schedule, format="svg")


def test_peaks_of_many_ranks_are_a_range() -> None:
    assert peak_text(range(1, 33)) == "1 to 32"


@pytest.mark.parametrize("clock", CLOCKS)
def test_trace_has_a_thread_a_rank_and_a_slice_an_action(clock: Clock) -> None:
    schedule = build("zb-h1")
    events = json.loads(trace_from_schedule(schedule, clock=clock, forward=0.5))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    spans = time_actions(schedule, clock=clock, forward=0.5)
    assert [(e["tid"], e["name"], e["ts"]) for e in slices] == [(s.rank, str(s.action), s.start * 1000) for s in spans]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["rank 0", "rank 1", "rank 2", "rank 3"]
