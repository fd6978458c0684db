"""CSV both ways: what is saved loads as the same schedule, torch's files load, and mistakes name their cell."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.meshes import ScheduleError
from trellax.schedules import (
    SCHEDULES,
    Placement,
    Schedule,
    build_schedule,
    load_schedule,
    schedule_from_csv,
    schedule_to_csv,
    simulate,
)

# As torch.distributed.pipelining writes them, compute only; its csv writer ends lines with CRLF.
TORCH_GPIPE = "0F0,0F1,,,0B0,0B1\r\n,1F0,1F1,1B0,1B1,\r\n"
TORCH_HALVES = "0F0,0F1,,,0I0,0I1,0W0,0W1\n,1F0,1I0,1F1,1I1,1W0,1W1,\n"

TORCH = Path(__file__).with_name("torch")
"""Files that `ScheduleZBVZeroBubble` and `ScheduleDualPipeV` of torch 2.13 wrote, compute only or lowered."""

MISTAKES = {
    "empty": "\n",
    "blank_cells": ",,\n,,\n",
    "bad_cell": "0F0,,0B0\n,1F0,1X0\n",
    "semicolons": "0F0;;0B0\n;1F0;1B0\n",
    "long_cell": "0F0,,0B0\n," + "9" * 9000 + "F0\n",
    "half_a_cell": "0F0+,0B0\n",
    "wrong_rank": "0F0,,1B0\n,1F0,0B0\n",
    "twice": "0F0,0F0,0B0\n",
    "missing": "0F0,,0B0\n,1F0,\n",
    "huge_microbatch": "0F99999999999,,0B0\n,1F0,1B0\n",
    "huge_stage": "0F0,,0B0,99999999998F0\n,1F0,1B0\n",
    "half_and_whole_of_one": "0F0,,0B0,0I0\n,1F0,1I0,1W0\n",
    "wrong_rank_in_a_v": "0F0,,,3F0,3B0,,,1B0\n,1F0,2F0,,,2B0,0B0\n",
    "missing_in_a_v": "0F0,,,3F0,3B0,,,0B0\n,1F0,2F0,,,2B0\n",
    "no_neighbours": "0F0,,,0B0\n2F0,2B0,,\n1F0,,1B0,\n3F0,3B0,,\n",
    "wrong_order": "0F0,0B0\n1B0,1F0\n",
    "ranks_wait_for_each_other": "0F0,0B1,0F1,0B0\n1F0,1B0,1F1,1B1\n",
    "open_quote": '0F0,"0B0\n',
}


@settings(derandomize=True, deadline=None)
@given(
    name=st.sampled_from([name for name in SCHEDULES if name != "auto"]),
    ranks=st.integers(1, 6),
    microbatches=st.integers(1, 12),
    chunks=st.integers(2, 3),
)
def test_saved_schedule_loads_with_the_same_order_on_every_rank(
    name: str, ranks: int, microbatches: int, chunks: int
) -> None:
    family = SCHEDULES[name]
    num_chunks = chunks if family.chunks == "several" else family.default_chunks
    schedule = build_schedule(name, num_ranks=ranks, num_microbatches=microbatches, num_chunks=num_chunks)
    loaded = schedule_from_csv(schedule_to_csv(schedule), name=name)
    assert (loaded.num_ranks, loaded.num_chunks, loaded.num_microbatches) == (ranks, num_chunks, microbatches)
    assert loaded.placement == schedule.placement
    for rank in range(ranks):
        assert [a for _, r, a in loaded.placed() if r == rank] == [a for _, r, a in schedule.placed() if r == rank]


def test_saved_table_has_a_row_a_rank_and_a_cell_a_tick(golden: Callable[[str, str], None]) -> None:
    golden("schedules/1f1b_3x4.csv", schedule_to_csv(build_schedule("1f1b", num_ranks=3, num_microbatches=4)))


def test_one_action_a_cell_is_torchs_format() -> None:
    schedule = build_schedule("gpipe", num_ranks=2, num_microbatches=2)
    assert schedule_to_csv(schedule) == "0F0,0F1,,,0B0,0B1\n,1F0,1F1,1B0,1B1,\n"


@pytest.mark.parametrize("text", [TORCH_GPIPE, TORCH_HALVES])
def test_compute_only_table_of_torch_loads(text: str) -> None:
    schedule = schedule_from_csv(text, name="torch")
    assert (schedule.num_ranks, schedule.num_chunks, schedule.num_microbatches) == (2, 1, 2)


@pytest.mark.parametrize("name", ["zbv_4x8", "dualpipev_4x8"])
def test_v_shaped_list_of_torch_loads_with_its_placement(name: str) -> None:
    schedule = load_schedule(TORCH / f"{name}.csv")
    assert schedule.placement == Placement.of("v", num_ranks=4, num_chunks=2)
    assert (schedule.num_chunks, schedule.num_microbatches) == (2, 8)
    # 3 ticks of a chunk more than the work of 8 microbatches, as our own have.
    assert simulate(schedule).makespan == (6 * 8 + 3) / 2


@pytest.mark.parametrize("name", ["dualpipev_4x8", "dualpipev_2x6_lowered"])
def test_dualpipev_of_torch_is_ours_tick_by_tick(name: str) -> None:
    said: list[str] = []
    theirs = load_schedule(TORCH / f"{name}.csv", say=said.append)
    sizes = {"num_ranks": theirs.num_ranks, "num_microbatches": theirs.num_microbatches}
    assert theirs.ticks == build_schedule("dualpipev", **sizes, num_chunks=2).ticks
    assert any(text.startswith("split ") and "whole backwards into I and W" in text for text in said)


def test_any_placement_of_neighbours_loads() -> None:
    """A ring that runs backwards is neither a loop nor a V."""
    schedule = schedule_from_csv("0F0,,,0B0\n,,2F0,2B0\n,1F0,,,1B0\n", name="mine")
    assert schedule.placement == Placement((0, 2, 1))


def test_b_beside_w_is_the_input_gradient_as_in_torch_2_5() -> None:
    assert schedule_from_csv(TORCH_HALVES.replace("I", "B"), name="torch") == schedule_from_csv(
        TORCH_HALVES, name="torch"
    )


def test_blank_cells_and_lines_change_no_schedule() -> None:
    tight = schedule_from_csv("0F0,0B0\n1F0,1B0\n", name="mine")
    assert schedule_from_csv("., ,0F0 ,,,0B0,,\n,1F0,,1B0\n\n", name="mine") == tight


def test_file_is_named_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("\ufeff0F0,0B0\n", encoding="utf-8")
    assert load_schedule(path).name == "mine.csv"


def load_and_listen(text: str) -> tuple[Schedule, list[str]]:
    said: list[str] = []
    return schedule_from_csv(text, name="mine", say=said.append), said


def test_actions_of_torch_that_a_schedule_does_not_have_are_left_out_and_reported() -> None:
    text = TORCH_GPIPE.replace("0B1\r", "0B1,0REDUCE_GRAD\r").replace("1B1,\r", "1B1,,1REDUCE_GRAD\r")
    schedule, said = load_and_listen(text)
    assert schedule == schedule_from_csv(TORCH_GPIPE, name="mine")
    assert said == ["left out 2 REDUCE_GRAD: sends, gathers and sums of gradients come by themselves"]


def test_lowered_list_of_torch_with_sends_and_gathers_loads() -> None:
    text = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0RESHARD\n1UNSHARD,1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n"
    schedule, said = load_and_listen(text)
    assert str(schedule) == str(schedule_from_csv("0F0,,,0B0\n,1F0,1B0,\n", name="mine"))
    assert len(said) == 2
    assert said[0].startswith("left out 1 RECV_B, 1 RECV_F, 1 REDUCE_GRAD, 1 RESHARD, 1 SEND_B, 1 SEND_F, 2 UNSHARD:")


def test_ticks_that_cannot_be_kept_are_reported() -> None:
    wanted = "the order of the file is kept, its ticks are not: 2 of 4 actions run at others, the first of them 1F0 at "
    assert load_and_listen("0F0,,,0B0\n1F0,1B0,,\n")[1] == [f"{wanted}tick 1, not 0"]
    assert load_and_listen("0F0,,,0B0\n,1F0,1B0,\n")[1] == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_table_says_where_it_is(mistake: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ScheduleError) as caught:
        schedule_from_csv(MISTAKES[mistake], name="mine.csv")
    golden(f"errors/pipeline/csv_{mistake}.txt", str(caught.value))


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("0F0,0B0\n")
    with pytest.raises(ScheduleError, match=r"there is no file .* Did you mean 'mine\.csv'"):
        load_schedule(tmp_path / "mien.csv")


@pytest.mark.parametrize("content", [b"\xff\xfe0\x00", None])
def test_file_that_is_not_text_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ScheduleError, match=r"mine\.csv"):
        load_schedule(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a named pipe": (os.mkfifo, "is a named pipe"),
    "a folder": (Path.mkdir, "is a folder"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a sparse file": (_sparse, "such a file has at most 16,777,216"),
    "links in a circle": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_file_that_does_not_end_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, why = ODD_FILES[name]
    make(tmp_path / "mine.csv")
    with pytest.raises(ScheduleError, match=why):
        load_schedule(tmp_path / "mine.csv")


def test_a_schedule_too_long_to_look_at_is_refused_before_it_is_parsed() -> None:
    text = ",".join(f"0{kind}{number}" for number in range(100_000) for kind in "FB")
    with pytest.raises(ScheduleError, match="200,000 actions; 60,000 are the most"):
        schedule_from_csv(text, name="mine.csv")
