"""Processes watch each other: one that fails, dies or stands still makes all the others stop, saying which it was.

Every process says a word to the coordinator's key-value store every second, and looks at the others' words and
failures. The arrays themselves would wait for a lost process for ever (or fail without a name). Read `aborts.py` for
the one death that ends the store itself.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback as tracebacks
from types import TracebackType
from typing import Any, Self

import jax

from ...meshes import TrellaxError
from ...meshes.processes.join import coordination_client
from ...meshes.processes.launchers import Processes
from ...meshes.processes.messages import announce_failure, read_failures

EXIT_LOST = 75
"""A process was lost, not by a fault of this one: starting again may do (sysexits' EX_TEMPFAIL)."""
_EXIT_MISTAKE, _EXIT_FAULT, _EXIT_INTERRUPTED = 2, 1, 130

_WORDS, _DONE = "trellax/words/", "done"
_WORD_EVERY_S, _PATIENCE_S = 1.0, 3.0


class ProcessWatch:
    """The watch of one process over the others; use as a context manager around all they do together.

    It ends the process with code 75 where another one is lost, and with the code of the first one that has failed.

    Args:
        silence_s: seconds without a word after which a process counts as lost.
    """

    def __init__(self, processes: Processes, *, silence_s: float) -> None:
        self._processes, self._silence_s = processes, silence_s
        self._client: Any = None
        now = time.monotonic()
        self._answered = now
        self._heard = dict.fromkeys(range(processes.count), ("", now))
        self._failed: dict[int, tuple[int, str]] = {}
        self._ended, self._is_done = threading.Event(), False
        self._leaving = threading.Lock()

    def __enter__(self) -> Self:
        self._client = coordination_client()
        now = self._answered = time.monotonic()
        self._heard = dict.fromkeys(self._heard, ("", now))
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name=f"process watch: {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._wait_for_all()
            self._ended.set()
            return
        if _is_of_jax(error):
            # A broken connection says nothing of who broke it: the watch finds out, and ends this process. It takes its
            # time over that, so this must take more.
            time.sleep(self._silence_s + 3 * _PATIENCE_S)
        self._fail(error)

    def explain_abort(self) -> tuple[str, int] | None:
        """Return what to say, and the exit code, when jax aborts this process; None if no other one is at fault."""
        if self._client is None:
            return self._goodbye("a process has ended while all joined"), EXIT_LOST
        if found := self._find_failure():
            return found
        try:
            socket.create_connection((self._processes.host, self._processes.port), _PATIENCE_S).close()
        except OSError:
            return self._goodbye(f"{self._name(0)}, the coordinator at {self._processes.coordinator}, died"), EXIT_LOST
        # It may be a little too early for the watch, not for jax.
        lost = self._find_lost(time.monotonic(), silence_s=_PATIENCE_S)
        return (self._goodbye(lost), EXIT_LOST) if lost else None

    def _talk(self) -> None:
        number = 0
        while not self._ended.wait(_WORD_EVERY_S):
            number += 1
            self._say(number)
            self._listen()

    def _say(self, number: int) -> None:
        word = f"{socket.gethostname()} {os.getpid()} {_DONE if self._is_done else number}"
        # Whether the coordinator answers is judged by time alone.
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_WORDS}{self._processes.index}", word, allow_overwrite=True)

    def _listen(self) -> None:
        try:
            words, failed = self._client.key_value_dir_get(_WORDS), read_failures()
        except Exception:
            return
        now = self._answered = time.monotonic()
        for key, text in words:
            index = int(key.rpartition("/")[2])
            if self._heard[index][0] != text:
                self._heard[index] = (text, now)
        self._failed = failed

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(0.5):
            now = time.monotonic()
            if now - looked > self._silence_s / 2:
                # This process itself stood still: it has no right to blame the others yet.
                self._answered = now
                self._heard = {index: (text, now) for index, (text, _) in self._heard.items()}
            looked = now
            if found := self._find_failure():
                self._leave(*found)
            elif lost := self._find_lost(now, silence_s=self._silence_s):
                self._leave(self._goodbye(lost), EXIT_LOST)

    def _find_failure(self) -> tuple[str, int] | None:
        """Return what to say of a failure that was announced, and its exit code."""
        own = self._processes.index
        for index, (code, text) in sorted(self._failed.items(), key=lambda item: item[0] != own):
            return (f"{text}\n" if index == own else self._goodbye(f"{self._name(index)} failed: {text}")), code
        return None

    def _find_lost(self, now: float, *, silence_s: float) -> str:
        if now - self._answered > silence_s:
            return f"{self._name(0)} has not answered for {now - self._answered:.0f} s: it died or stands still"
        for index, (text, heard) in self._heard.items():
            if index != self._processes.index and not text.endswith(_DONE) and now - heard > silence_s:
                return f"{self._name(index)} has said nothing for {now - heard:.0f} s: it died or stands still"
        return ""

    def _name(self, index: int) -> str:
        words = self._heard[index][0].split()
        place = f" (process id {words[1]} on {words[0]})" if len(words) == 3 else ""
        return f"process {index} of {self._processes.count}{place}"

    def _goodbye(self, why: str) -> str:
        first_line = why.splitlines()[0].rstrip(".")
        return f"{first_line}. {self._name(self._processes.index)} stops; what is saved stays.\n"

    def _wait_for_all(self) -> None:
        """Return when all are done: one that fails in what it alone does at the end must still be heard."""
        self._is_done = True
        self._say(0)
        while not all(text.endswith(_DONE) for text, _ in self._heard.values()):
            time.sleep(0.05)
            self._listen()

    def _fail(self, error: BaseException) -> None:
        """Tell the others of an error of this process, and end it."""
        index, code = self._processes.index, _exit_code(error)
        # The watch would end this process by its own failure.
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()
        text = f"{type(error).__name__}: {error}"
        announce_failure(error, code=code)
        # Where all make the same mistake the first one's words are enough.
        is_told = index > 0 and code == _EXIT_MISTAKE and self._first_says(text)
        trace = "".join(tracebacks.format_exception(error)) if code == _EXIT_FAULT else f"{text}\n"
        self._end("" if is_told else trace, code)

    def _first_says(self, text: str) -> bool:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and 0 not in self._failed:
            time.sleep(0.1)
            self._listen()
        # The first one's own error may be of another kind than what it told the others.
        said = self._failed.get(0, (0, ""))[1].partition("\n")[0].partition(": ")[2]
        return said != "" and said in text

    def _leave(self, text: str, code: int) -> None:
        if self._leaving.acquire(blocking=False):
            self._end(text, code)

    def _end(self, text: str, code: int) -> None:
        # A stream that is closed or full must keep no process alive.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        if self._processes.index == 0:
            # The coordinator goes with this process, and jax then aborts the others before they have found out.
            time.sleep(_PATIENCE_S + _WORD_EVERY_S)
        # Python's own end would wait for the others at jax's shutdown barrier.
        os._exit(code)


def _is_of_jax(error: BaseException | None) -> bool:
    """Whether jax's runtime failed, in itself or as the reason of another error."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TrellaxError):
        return _EXIT_MISTAKE
    return _EXIT_FAULT if isinstance(error, Exception) else _EXIT_INTERRUPTED
