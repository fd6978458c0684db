"""The tables of the tutorial about sweeps are what its commands print, but for the speed of a machine."""

import re
import shlex
from pathlib import Path

import pytest

from .pages import DOCS, blocks_of, commands_of, run_as_user


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of each run: learning rate, seed, state, step, loss, validation loss, and "best" or nothing."""
    found = []
    for line in table.splitlines()[1:]:
        if line.startswith("runs/"):
            break
        cells = line.split()
        found.append([*cells[:6], *cells[7:]])
    return found


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_tables_are_those_that_the_commands_print(tmp_path: Path) -> None:
    blocks = blocks_of(DOCS / "tutorials" / "sweep.md")
    make = next(block.text for block in blocks if block.text.startswith("python -c "))
    code = shlex.split(make)[2]
    (tmp_path / "squares.jsonl").write_text(run_as_user(["-c", code], folder=tmp_path).stdout)
    tables = [block.text for block in blocks if block.language == "text"]
    commands = [command for block in blocks for command in commands_of(block) if command.startswith("trellax sweep")]
    assert len(tables) == len(commands) == 2
    for command, table in zip(commands, tables, strict=True):
        words = shlex.split(command)[1:]
        printed = run_as_user(["-m", "trellax.commands.cli", *words], folder=tmp_path).stdout
        assert re.fullmatch(r"learning_rate +seed +state +step +loss +val loss +tokens/s", printed.splitlines()[0])
        for row, expected in zip(rows_of(printed), rows_of(table), strict=True):
            assert [*row[:4], *row[6:]] == [*expected[:4], *expected[6:]]
            # Versions of jax add in another order, and a rate of 1e-2 magnifies that.
            assert [float(loss) for loss in row[4:6]] == pytest.approx(
                [float(loss) for loss in expected[4:6]], abs=5e-3
            )
