"""`trellax generate --chat`: the history goes through the template, answers stream, and stop as they are told to."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from trellax.commands.cli import main
from trellax.commands.generation import chat
from trellax.commands.generation.conversation import Answer

from ..test_generate import run_folder

__all__ = ["run_folder"]

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
FEW = ["--max-new-tokens", "3", "--temperature", "0.9"]

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command with `--chat` on the run folder, which has a chat template; exit code, stdout and stderr."""
    (run_folder / "chat_template.jinja").write_text(TEMPLATE)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["generate", str(run_folder), "--chat", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def type_in(monkeypatch: pytest.MonkeyPatch, *messages: str | type[BaseException]) -> None:
    """Let the terminal have these messages; an exception is what a key would raise."""
    left = iter(messages)

    def read(_: str) -> str:
        message = next(left)
        if isinstance(message, str):
            return message
        raise message

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", terminal := TextIOWrapper(BytesIO()))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_each_answer_is_that_of_the_whole_conversation(ask: Ask, run_folder: Path, capsys: Any) -> None:
    code, out, _ = ask(*FEW, "--json", "--system", "S", "--prompt", "hi", "--prompt", "yo")
    first, second = lines(out)
    assert (code, first["message"], second["message"]) == (0, "hi", "yo")
    # The texts that the template makes of it, as plain prompts; the second message has the next seed.
    prompts = ["sSuhia", f"sSuhia{first['completion']}uyoa"]
    for seed, (prompt, answer) in enumerate(zip(prompts, (first, second), strict=True)):
        words = ["generate", str(run_folder), *FEW, "--json", "--prompt", prompt, "--seed", str(seed)]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)[0]["token_ids"] == answer["token_ids"]


@pytest.mark.slow
def test_typed_messages_are_answered_until_the_end(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "hi", "", KeyboardInterrupt, "yo", "x" * 99, "/new", "hi", "/quit")
    code, out, err = ask(*FEW, "--json")
    typed = lines(out)
    assert (code, [one["message"] for one in typed]) == (0, ["hi", "yo", "hi"])
    assert "leaves no room for an answer in 32" in err
    type_in(monkeypatch, "hi", EOFError)
    code, out, _ = ask(*FEW)
    assert (code, out) == (0, typed[0]["completion"] + "\n")


def test_text_of_a_pipe_is_one_message(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"h\ni\n")))
    code, out, _ = ask(*FEW, "--json")
    assert (code, lines(out)[0]["message"]) == (0, "h\ni")
    for content, problem in ((b"\n", "no message on stdin"), (b"\xff", "is not UTF-8 text")):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(content)))
        code, out, err = ask(*FEW)
        assert (code, out) == (2, "")
        assert problem in err


@pytest.mark.slow
def test_interrupt_stops_the_answer_and_the_conversation_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, seen = Answer.pieces, list[int]()

    def interrupt(self: Answer) -> Any:
        for piece in pieces(self):
            yield piece
            if len(self.sequence.tokens) >= 2 and not seen:
                seen.append(len(self.sequence.tokens))
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat.Answer, "pieces", interrupt)
    type_in(monkeypatch, "hi", "yo", EOFError)
    code, out, err = ask("--json", "--max-new-tokens", "12")
    first, second = lines(out)
    assert (code, first["finish_reason"]) == (0, "cancelled")
    assert seen[0] <= len(first["token_ids"]) <= seen[0] + 2
    assert second["finish_reason"] == "length"
    assert "tokens/s, stopped" in err


@pytest.mark.slow
def test_terminal_of_its_own_holds_a_conversation(run_folder: Path) -> None:
    """A process with a terminal: it shows a prompt, streams, and ends at Ctrl-D."""
    (run_folder / "chat_template.jinja").write_text(TEMPLATE)
    own, its = pty.openpty()
    words = [sys.executable, "-m", "trellax.commands.cli", "generate", str(run_folder), "--chat", *FEW]
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    shown, sent, end_s = b"", 0, time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end_s:
        try:
            shown += os.read(own, 4096)
        except OSError:
            break
        # The second prompt comes after the first answer.
        if shown.count(b"> ") > sent:
            os.write(own, b"hi\n" if sent == 0 else b"\x04")
            sent += 1
    assert process.wait(30) == 0, shown
    assert sent == 2
    assert b"tokens/s" in shown
