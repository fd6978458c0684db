"""The page of commands says what the parser says; `make golden` rewrites it."""

import os
import re

import pytest
from trellax.commands import cli

from .pages import DOCS

PAGE = DOCS / "reference" / "commands.md"
_HELP = re.compile(r"<!-- help: ([\w-]*) -->\n```text\n(.*?)```\n", flags=re.DOTALL)
FIRST_KEY = "  --run."
"""Where the keys of a config begin, which have a page of their own."""


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the help of a command, without its line of usage, which Python's versions break differently."""
    monkeypatch.setenv("COLUMNS", "110")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out.partition("\n\n")[2]
    lines = text.splitlines()
    first_key = next((number for number, line in enumerate(lines) if line.startswith(FIRST_KEY)), len(lines))
    return "\n".join(lines[:first_key]).strip()


def test_every_command_is_on_the_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = re.findall(r"^    ([\w-]+)(?:  |$)", help_of("", capsys, monkeypatch), flags=re.MULTILINE)
    named = re.findall(r"^## trellax ([\w-]+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    helped = [command for command, _ in _HELP.findall(PAGE.read_text(encoding="utf-8")) if command]
    assert sorted(named) == sorted(helped) == sorted(listed)


def test_commands_page_says_what_the_parser_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGE.read_text(encoding="utf-8")

    def say(match: re.Match[str]) -> str:
        return f"<!-- help: {match[1]} -->\n```text\n{help_of(match[1], capsys, monkeypatch)}\n```\n"

    expected = _HELP.sub(say, text)
    if os.environ.get("GOLDEN") == "1":
        PAGE.write_text(expected, encoding="utf-8")
    # Word by word: Python 3.13 aligns the columns of its help in another way.
    assert PAGE.read_text(encoding="utf-8").split() == expected.split()
