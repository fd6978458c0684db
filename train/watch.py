"""Processes watch each other: one that dies or stands still makes all the others stop, and they say which it was.

Every process says a word to the coordinator's key-value store every few seconds, and looks at the others' words. The
arrays themselves would wait for a lost process for ever (or fail without a name). Read `witness.py` for the one death
that cannot be told from inside.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from ..meshes import Processes, TrellaxError, coordination_client
from .witness import Witness

EXIT_LOST = 75
"""A process was lost, not by a fault of this one: starting again may do (sysexits' EX_TEMPFAIL)."""

_WORDS, _FAILURES, _DONE = "trellax/words/", "trellax/failures/", "done"
_WORD_EVERY_S, _PATIENCE_S = 1.0, 3.0


class ProcessWatch:
    """The watch of one process over the others; use as a context manager around all they do together.

    Args:
        silence_s: seconds without a word after which a process counts as lost.
    """

    def __init__(self, processes: Processes, *, silence_s: float) -> None:
        self._processes, self._silence_s = processes, silence_s
        self._client: Any = coordination_client()
        self._witness = Witness(processes)
        now = time.monotonic()
        self._answered = now
        self._heard = dict.fromkeys(range(processes.count), ("", now))
        self._failed: dict[int, str] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name=f"process watch: {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._say(_WORDS, _DONE)
            self._stop_watching()
        elif isinstance(error, TrellaxError):
            self._say(_FAILURES, str(error).splitlines()[0])
            # Where all make the same mistake the first one's words are enough.
            is_told = self._processes.index > 0 and self._wait_for_first()
            self._stop_watching()
            text = "" if is_told else f"{type(error).__name__}: {error}\n"
            self._leave(text, code=2)
        elif isinstance(error, Exception):
            # A broken connection says nothing of who broke it: the watch finds out, and ends this process. It takes its
            # time over that, so this must take more.
            time.sleep(self._silence_s + 3 * _PATIENCE_S)
            self._say(_FAILURES, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
            self._stop_watching()

    def _talk(self) -> None:
        me, number = f"{socket.gethostname()} {os.getpid()}", 0
        while not self._ended.wait(_WORD_EVERY_S):
            number += 1
            self._say(_WORDS, f"{me} {number}")
            self._listen()

    def _say(self, folder: str, text: str) -> None:
        # Whether the coordinator answers is judged by time alone.
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{folder}{self._processes.index}", text, allow_overwrite=True)

    def _listen(self) -> None:
        try:
            words = self._client.key_value_dir_get(_WORDS)
            failures = self._client.key_value_dir_get(_FAILURES)
        except Exception:
            return
        now = self._answered = time.monotonic()
        for key, text in words:
            index = int(key.rpartition("/")[2])
            if self._heard[index][0] != text:
                self._heard[index] = (text, now)
        self._failed = {int(key.rpartition("/")[2]): text for key, text in failures}

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(1.0):
            now = time.monotonic()
            if now - looked > self._silence_s / 2:
                # This process itself stood still: it has no right to blame the others yet.
                self._answered = now
                self._heard = {index: (text, now) for index, (text, _) in self._heard.items()}
            looked = now
            if culprit := self._find_culprit(now):
                self._witness.let_go()
                self._leave(
                    f"{culprit.rstrip('.')}. {self._name(self._processes.index)} stops; what is saved stays.\n",
                    code=EXIT_LOST,
                )

    def _find_culprit(self, now: float) -> str:
        for index, text in sorted(self._failed.items()):
            if index != self._processes.index:
                return f"{self._name(index)} failed: {text}"
        if now - self._answered > self._silence_s:
            return f"{self._name(0)} has not answered for {now - self._answered:.0f} s: it died or stands still"
        for index, (text, heard) in self._heard.items():
            if index != self._processes.index and text != _DONE and now - heard > self._silence_s:
                return f"{self._name(index)} has said nothing for {now - heard:.0f} s: it died or stands still"
        return ""

    def _name(self, index: int) -> str:
        words = self._heard[index][0].split()
        place = f" (process id {words[1]} on {words[0]})" if len(words) == 3 else ""
        return f"process {index} of {self._processes.count}{place}"

    def _wait_for_first(self) -> bool:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and 0 not in self._failed:
            time.sleep(0.1)
            self._listen()
        return 0 in self._failed

    def _stop_watching(self) -> None:
        self._ended.set()
        self._witness.let_go()

    def _leave(self, text: str, *, code: int) -> None:
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), text.encode())
        if self._processes.index == 0:
            # The coordinator goes with this process, and jax then aborts the others before they have found out.
            time.sleep(_PATIENCE_S + _WORD_EVERY_S)
        # Python's own end would wait for the others at jax's shutdown barrier.
        os._exit(code)
