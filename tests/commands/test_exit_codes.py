"""Each exit code of the command line is on its page of the reference, and no other."""

import re
from pathlib import Path

import pytest
from trellax.commands import cli
from trellax.commands.standard_streams import EXIT_LOST_OUTPUT, EXIT_UNREAD
from trellax.meshes import LostProcessError, MeshError
from trellax.train.processes.watchdog import EXIT_LOST
from trellax.train.stop import EXIT_INTERRUPTED

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md").read_text(encoding="utf-8")


def test_page_lists_the_exit_codes() -> None:
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)]
    assert listed == sorted({0, EXIT_LOST_OUTPUT, 2, EXIT_LOST, EXIT_INTERRUPTED, EXIT_UNREAD})


@pytest.mark.parametrize(
    ("error", "code"),
    [(MeshError("x"), 2), (LostProcessError("x"), EXIT_LOST), (KeyboardInterrupt(), EXIT_INTERRUPTED)],
)
def test_error_ends_with_its_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(entry: str) -> None:
        raise error

    monkeypatch.setattr(cli, "import_function", fail)
    assert cli.main(["train", "quickstart"]) == code
    assert capsys.readouterr().out == ""


def test_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_command", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "quickstart"])
