"""`trellax schedule`: drawn, saved, compared, as numbers, and exit code 2 with a way out for a user's mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.train.cli import main

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
    "unknown_option": "1f1b --ranks 2 --microbatches 4 --pgn x.png",
    "override": "1f1b --ranks 2 --microbatches 4 --mesh.pipe 2",
    "file_with_sizes": "--file mine.csv --ranks 2",
    "missing_file": "--file nowhere/mine.csv",
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
    golden(f"errors/cli_schedule_{mistake}.txt", err)


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


@pytest.mark.parametrize("clock", ["lockstep", "async"])
def test_numbers_come_as_json(clock: str, golden: Golden, capsys: Capture) -> None:
    golden(f"schedule_{clock}.json", run(f"1f1b --ranks 4 --microbatches 32 --clock {clock} --json", capsys))


def test_all_schedules_are_compared(golden: Golden, capsys: Capture) -> None:
    golden("schedule_compare.txt", run("--compare --ranks 4 --microbatches 8", capsys))


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
    golden("errors/cli_schedule_bad_cell.txt", capsys.readouterr().err)
