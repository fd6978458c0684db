"""`trellax schedule`: drawn, saved, compared, as numbers, and exit code 2 with a way out for a user's mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main

Golden = Callable[[str, str], None]
Capture = pytest.CaptureFixture[str]

MISTAKES = {
    "nothing": "",
    "name_and_file": "1f1b --file mine.csv",
    "unknown_name": "1fb1 --ranks 2 --microbatches 4",
    "far_name": "dualpipe --ranks 2 --microbatches 4",
    "no_ranks": "1f1b --microbatches 4",
    "no_sizes": "--compare",
    "zero_ranks": "interleaved-1f1b --ranks 0 --microbatches 4",
    "negative_microbatches": "1f1b --ranks 2 --microbatches -4",
    "zero_chunks": "interleaved-1f1b --ranks 2 --microbatches 4 --chunks 0",
    "chunks_of_1f1b": "1f1b --ranks 2 --microbatches 4 --chunks 2",
    "one_chunk": "interleaved-1f1b --ranks 2 --microbatches 4 --chunks 1",
    "ranks_in_words": "1f1b --ranks two --microbatches 4",
    "too_large": "naive --ranks 1000 --microbatches 1000",
    "unknown_clock": "1f1b --ranks 2 --microbatches 4 --clock asynch",
    "negative_cost": "1f1b --ranks 2 --microbatches 4 --forward -1",
    "cost_is_no_number": "1f1b --ranks 2 --microbatches 4 --weight-grad nan",
    "cost_too_large": "1f1b --ranks 2 --microbatches 2 --forward 1e308 --input-grad 1e308",
    "layers_too_large": "1f1b --ranks 2 --microbatches 2 --layers 1e308,1e308",
    "layers_in_words": "1f1b --ranks 2 --microbatches 4 --layers 8,six",
    "layers_of_nothing": "1f1b --ranks 2 --microbatches 4 --layers 8,0",
    "layers_without_a_stage": "1f1b --ranks 4 --microbatches 4 --layers 8,8,6",
    "layers_of_chunks": "interleaved-1f1b --ranks 2 --microbatches 4 --layers 8,8",
    "compare_with_layers": "--compare --ranks 2 --microbatches 4 --layers 8,6",
    "limit_of_1f1b": "1f1b --ranks 2 --microbatches 4 --max-in-flight 2",
    "limit_of_a_comparison": "--compare --ranks 2 --microbatches 4 --max-in-flight 2",
    "limit_of_none": "auto --ranks 2 --microbatches 4 --max-in-flight 0",
    "unknown_option": "1f1b --ranks 2 --microbatches 4 --pgn x.png",
    "override": "1f1b --ranks 2 --microbatches 4 --mesh.pipe 2",
    "file_with_sizes": "--file mine.csv --ranks 2",
    "missing_file": "--file nowhere/mine.csv",
    "compare_with_messages": "--compare --ranks 2 --microbatches 4 --messages",
    "three_chunks_of_a_v": "v-half --ranks 2 --microbatches 4 --chunks 3",
    "compare_with_picture": "--compare --ranks 2 --microbatches 4 --png x.png",
    "no_folder_to_write_to": "1f1b --ranks 2 --microbatches 4 --csv nowhere/x.csv",
}


def run(words: str, capsys: Capture) -> str:
    assert main(["schedule", *words.split()]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_exit_code_2_and_a_way_out(mistake: str, golden: Golden, capsys: Capture) -> None:
    assert main(["schedule", *MISTAKES[mistake].split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/cli_schedule_{mistake}.txt", err)


def test_schedule_is_drawn_plainly_where_there_is_no_terminal(golden: Golden, capsys: Capture) -> None:
    golden("schedule_1f1b_4x8.txt", run("1f1b --ranks 4 --microbatches 8", capsys))


def test_terminal_gets_colours_and_lines_of_its_width(
    golden: Golden, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    golden("schedule_zb_h1_colour.txt", run("zb-h1 --ranks 2 --microbatches 6", capsys).replace("\x1b", "ESC"))


def test_difference_from_the_formula_is_explained(golden: Golden, capsys: Capture) -> None:
    golden("schedule_difference.txt", run("zb-h1 --ranks 4 --microbatches 8 --input-grad 1.5", capsys))


def test_uneven_stages_are_drawn_with_their_own_bubble(golden: Golden, capsys: Capture) -> None:
    golden("schedule_layers.txt", run("1f1b --ranks 4 --microbatches 8 --layers 8,8,8,6", capsys))


def test_uneven_stages_come_as_json_too(capsys: Capture) -> None:
    numbers = json.loads(run("1f1b --ranks 3 --microbatches 2 --layers 3,3,2 --json", capsys))
    assert numbers["layers"] == [3, 3, 2]
    # 30 x 3 of time and 48 of work, as summed by hand for layers of time 1; here a mean rank takes 1.
    assert numbers["makespan"] == pytest.approx(30 * 3 / 8)
    assert numbers["bubble_fraction"] == pytest.approx(1 - 48 / 90)


def test_mean_rank_takes_the_time_given(capsys: Capture) -> None:
    words = "--ranks 2 --microbatches 1 --forward 2 --input-grad 3 --weight-grad 4 --json"
    whole = json.loads(run(f"naive {words}", capsys))
    uneven = json.loads(run(f"naive {words} --layers 1,3", capsys))
    assert uneven["makespan"] == pytest.approx(whole["makespan"]) == pytest.approx(2 * (2 + 3 + 4))


def test_chunks_have_a_size_each(capsys: Capture) -> None:
    words = "interleaved-1f1b --ranks 2 --microbatches 4 --json"
    even = json.loads(run(words, capsys))
    assert json.loads(run(f"{words} --layers 7,7,7,7", capsys)) == even | {"layers": [7, 7, 7, 7]}
    assert json.loads(run(f"{words} --layers 7,7,7,8", capsys))["bubble_fraction"] > even["bubble_fraction"]


def test_uneven_stages_of_a_file_are_written_as_pictures_and_traces(capsys: Capture) -> None:
    Path("mine.csv").write_text("0F0,,0B0\n,1F0+1B0,\n")
    run("--file mine.csv --layers 3,1 --svg a.svg --trace a.json", capsys)
    # Ticks of 1.5, 0.5 + 1 and 3; the ranks work 4.5 and 1.5 of these 6.
    assert "bubble 50.0%" in Path("a.svg").read_text()
    spans = [event["dur"] for event in json.loads(Path("a.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert spans == [1500, 500, 1000, 3000]


def test_limit_makes_auto_hold_less(capsys: Capture) -> None:
    free = json.loads(run("auto --ranks 4 --microbatches 8 --json", capsys))
    tight = json.loads(run("auto --ranks 4 --microbatches 8 --max-in-flight 2 --json", capsys))
    assert max(free["peak_in_flight"]) > 2 >= max(tight["peak_in_flight"])
    assert tight["makespan"] > free["makespan"]


def test_auto_knows_the_costs(capsys: Capture) -> None:
    words = "--ranks 4 --microbatches 8 --weight-grad 0.1 --json"
    best = json.loads(run(f"auto {words}", capsys))["makespan"]
    assert best <= min(json.loads(run(f"{name} {words}", capsys))["makespan"] for name in ("1f1b", "zb-h1", "gpipe"))


@pytest.mark.parametrize("clock", ["lockstep", "async"])
def test_numbers_come_as_json(clock: str, golden: Golden, capsys: Capture) -> None:
    golden(f"schedule_{clock}.json", run(f"1f1b --ranks 4 --microbatches 32 --clock {clock} --json", capsys))


def test_all_schedules_are_compared(golden: Golden, capsys: Capture) -> None:
    golden("schedule_compare.txt", run("--compare --ranks 4 --microbatches 8", capsys))


def test_all_schedules_are_compared_on_more_ranks(golden: Golden, capsys: Capture) -> None:
    golden("schedule_compare_8x32.txt", run("--compare --ranks 8 --microbatches 32", capsys))


def test_v_shaped_schedule_says_which_rank_holds_which_stage(golden: Golden, capsys: Capture) -> None:
    golden("schedule_v_half.txt", run("v-half --ranks 4 --microbatches 4", capsys))


def test_stages_of_many_ranks_are_cut_short(capsys: Capture) -> None:
    out = run("v-min --ranks 20 --microbatches 1", capsys)
    assert "stages of rank 0: 0, 39; rank 1: 1, 38;" in out
    assert "rank 15: 15, 24; ..." in " ".join(out.split())


def test_messages_are_printed_below_the_grid(capsys: Capture) -> None:
    lines = run("gpipe --ranks 2 --microbatches 1 --messages", capsys).splitlines()
    assert lines[2:5] == [
        "tick  from  to  what          stages",
        "   0     0   1  activation 0  0 -> 1",
        "   2     1   0  gradient 0    1 -> 0",
    ]


def test_messages_and_placement_come_as_json(capsys: Capture) -> None:
    numbers = json.loads(run("zb-v --ranks 2 --microbatches 3 --messages --json", capsys))
    assert numbers["rank_of_stage"] == [0, 1, 1, 0]
    assert len(numbers["sent"]) == 2 * 3 * 2
    assert numbers["sent"][0] == {
        "tick": 0,
        "sender": 0,
        "receiver": 1,
        "kind": "activation",
        "microbatch": 0,
        "from_stage": 0,
        "to_stage": 1,
    }


def test_chunks_leave_out_schedules_that_cannot_have_them(capsys: Capture) -> None:
    rows = json.loads(run("--compare --ranks 2 --microbatches 4 --chunks 3 --json", capsys))
    assert {row["name"]: row["chunks"] for row in rows if row["chunks"] > 1} == {
        "interleaved-1f1b": 3,
        "interleaved-zb-h1": 3,
        "auto": 3,
    }


def test_comparison_comes_as_json_too(capsys: Capture) -> None:
    rows = json.loads(run("--compare --ranks 2 --microbatches 4 --chunks 1 --json", capsys))
    assert rows[0]["name"] == "naive"
    assert not [row for row in rows if row["chunks"] > 1]


def test_saved_schedule_is_read_again(capsys: Capture) -> None:
    run("gpipe --ranks 3 --microbatches 4 --csv 1f1b", capsys)
    numbers = json.loads(run("--file 1f1b --json", capsys))
    assert (numbers["name"], numbers["ranks"], numbers["microbatches"], numbers["chunks"]) == ("1f1b", 3, 4, 1)
    # A file is not the schedule it is named after.
    assert numbers["formula_bubble_fraction"] is None


def test_every_file_asked_for_is_written(capsys: Capture) -> None:
    words = "interleaved-1f1b --ranks 2 --microbatches 4 --png a.png --svg a.svg --csv a.csv --trace a.json"
    assert main(["schedule", *words.split()]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["wrote a.png", "wrote a.svg", "wrote a.csv", "wrote a.json"]
    assert "0F0" not in out
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path("a.svg").read_bytes()
    assert Path("a.csv").read_text().startswith("0F0,0F1,")
    assert json.loads(Path("a.json").read_text())["traceEvents"]


def test_mistake_in_a_file_names_its_cell(golden: Golden, capsys: Capture) -> None:
    Path("mine.csv").write_text("0F0,,0B0\n,1F0,1Q0\n")
    assert main(["schedule", "--file", "mine.csv"]) == 2
    golden("errors/commands/cli_schedule_bad_cell.txt", capsys.readouterr().err)
