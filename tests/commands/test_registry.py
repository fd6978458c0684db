"""Every command of the registry has its functions, and its name and help appear in the help of all."""

from argparse import ArgumentParser

import pytest
from trellax.commands.cli import main
from trellax.commands.registry import COMMANDS, Command, find_command, import_function


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_functions_of_a_command_are_there(command: Command) -> None:
    parser = ArgumentParser()
    import_function(command.arguments)(parser)
    assert "--json" in parser.format_help()
    assert all(callable(import_function(entry)) for entry in (command.run, command.check) if entry)
    assert find_command(command.name) is command


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [command.name for command in COMMANDS if command.name not in shown or command.help not in shown] == []
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_has_a_help_text(command: Command) -> None:
    parser = ArgumentParser()
    import_function(command.arguments)(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
