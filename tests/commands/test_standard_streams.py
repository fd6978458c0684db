"""With a stdout or stderr that is closed, full or unread, a lost result is an error and a lost message is not."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from trellax.commands import cli
from trellax.commands import train as train_command
from trellax.meshes.silent_stream import SilentStream

SCHEDULE = ["schedule", "1f1b", "--ranks", "2", "--microbatches", "4"]
Open = Callable[[str], TextIO | None]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Streams that cannot be written, as Python gives them to a program."""
    streams: list[TextIO] = []

    def open_stream(how: str) -> TextIO | None:
        if how == "closed":
            return None
        if how == "full":
            streams.append(Path("/dev/full").open("w", encoding="utf-8", buffering=1))  # noqa: SIM115
        else:
            reader, writer = os.pipe()
            os.close(reader)
            streams.append(os.fdopen(writer, "w", buffering=1, encoding="utf-8"))
        return streams[-1]

    yield open_stream
    for stream in streams:
        # Nothing is left in them that would fail now.
        stream.close()


@pytest.mark.parametrize(
    "case",
    [
        ("full", 1, "stdout cannot be written: No space left on device; the result is lost\n"),
        ("closed", 1, "stdout cannot be written: Bad file descriptor; the result is lost\n"),
        ("unread", 141, ""),
    ],
)
def test_lost_result_is_an_error(
    case: tuple[str, int, str], opened: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how, code, said = case
    for words in (SCHEDULE, ["--help"], ["--version"]):
        monkeypatch.setattr(sys, "stdout", opened(how))
        assert cli.main(words) == code
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("how", ["full", "closed", "unread"])
def test_lost_messages_change_no_result(
    how: str, opened: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", opened(how))
    assert cli.main([*SCHEDULE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main(["schedule", "1fb1"]) == 2


def test_run_is_done_though_its_summary_is_lost(
    opened: Open,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    class Done:
        folder, ended, steps = str(tmp_path), "SIGTERM", 3

    monkeypatch.setattr(train_command, "train", lambda *_, **__: Done)
    monkeypatch.setattr(sys, "stdout", opened("full"))
    assert cli.main(["train", "quickstart"]) == 0
    assert capsys.readouterr().err == f"stdout cannot be written: No space left on device; all is in {tmp_path}\n"


def test_messages_go_on_when_there_is_room_again() -> None:
    class Full(io.StringIO):
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    stream = Full()
    silent = SilentStream(stream)
    assert silent.write("lost") == 4
    stream.is_full = False
    silent.write("told")
    assert (stream.getvalue(), silent.is_broken) == ("told", True)
