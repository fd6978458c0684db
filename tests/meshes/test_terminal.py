"""Nothing that is printed is wider than the terminal; pipes have no width and no colours."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from trellax.commands.cli import main
from trellax.meshes.sharding_table import ShardingRow, ShardingTable
from trellax.meshes.terminal import fold, terminal_width

GRID = "schedule zb-h1 --ranks 4 --microbatches 8"
COMMANDS = [
    "plan llama3-8b-8gpu --topology h100x8",
    "plan llama3-70b-64gpu --topology a100x8 --objective latency",
    "plan llama3-8b-8gpu --topology a100-pciex8 --this",
    "describe quickstart",
    "schedule --compare --ranks 4 --microbatches 8",
    GRID,
    *(f"{name} --help" for name in ("train", "describe", "inspect", "plan", "schedule", "checkpoints")),
    *(f"{name} --help" for name in ("generate", "bench-decode", "import-hf", "export-hf")),
]


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with contextlib.suppress(SystemExit):
        assert main(words.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in COMMANDS:
        too_wide = [line for line in printed(words, capsys).splitlines() if len(line) > columns]
        assert (words, too_wide) == (words, [])


def test_no_error_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["trian"]) == 2
    told = capsys.readouterr().err
    assert max(map(len, told.splitlines())) <= 80
    assert "Did you mean 'train'?" in " ".join(told.split())


def test_narrow_tables_lose_no_column(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = COMMANDS[0]
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = printed(words, capsys)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, wide.splitlines())) > 80
    assert sorted(set(wide.split())) == sorted(set(printed(words, capsys).split()))


def test_a_sharding_table_reports_the_columns_that_it_leaves_out() -> None:
    row = ShardingRow(name="stages." + "x" * 30, shape="[8, 8192@tensor, 1024]", total_bytes=2**40, device_bytes=2**30)
    table = ShardingTable(rows=(row,))
    for width in (None, 100, 80, 60):
        text = table.draw(width=width)
        assert all(len(line) <= (width or 1000) for line in text.splitlines())
        assert (f"{2**40:,}" in text) == ("left out" not in text)
        for part in (row.name, row.shape, f"{2**30:,}"):
            assert part in text
    assert str(table) == table.draw()


def test_lines_go_on_below_their_indentation() -> None:
    assert fold("  one two three", width=11) == "  one two\n    three"
    assert fold("one two three", width=None) == "one two three"


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, int]]:
    """A terminal of so many columns: what writes to it, and what reads it."""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writing, "w") as stream:
        yield stream, reading
    os.close(reading)


def test_width_is_that_of_the_terminal_or_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with terminal(97) as (stream, _):
        assert terminal_width(stream) == 97
        monkeypatch.setenv("COLUMNS", "120")
        assert terminal_width(stream) == 120
        for useless in ("", "0", "wide", "-3", "\u0663"):
            monkeypatch.setenv("COLUMNS", useless)
            assert terminal_width(stream) == 97
    monkeypatch.delenv("COLUMNS")
    with Path(os.devnull).open("w") as pipe:
        assert terminal_width(pipe) is None


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_and_not_with_no_color(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    with terminal(70) as (stream, reading):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(GRID.split()) == 0
        stream.flush()
        shown = os.read(reading, 1 << 16).decode()
    assert ("\x1b[3" in shown) == (no_color == "")
    assert "ticks 0 to" in shown


def test_a_pipe_gets_no_escape_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in printed(GRID, capsys)
