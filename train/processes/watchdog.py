"""Stop all processes of a run when one of them fails, dies or hangs, and name the one that did.

A collective with a lost process waits without end, or fails without a name. So every process writes a heartbeat into
the key-value store of jax's coordinator once a second, and reads those of the others:

    key                     value
    trellax/heartbeats/3    node7 41235 58      host, process id, counter; "done" instead of the counter at the end
    trellax/failures/3      2 DataError: ...    exit code and error, from `announce_failure`

Two threads do this. `_exchange` writes and reads the store; `_judge` looks at the times at which a heartbeat last
changed. Read `abort_handler.py` for the death of the coordinator, which ends the store itself.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback as tracebacks
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import jax

from ...meshes import TrellaxError
from ...meshes.processes.join import coordination_client
from ...meshes.processes.launchers import Processes
from ...meshes.processes.messages import announce_failure, read_failures

EXIT_LOST = 75
"""Exit code: another process was lost, so starting the run again may help (EX_TEMPFAIL of sysexits.h)."""
_EXIT_MISTAKE, _EXIT_FAULT, _EXIT_INTERRUPTED = 2, 1, 130

SAVED_STAYS = "what is saved stays"
"""Parting words of a run."""

_HEARTBEATS, _DONE = "trellax/heartbeats/", "done"
_HEARTBEAT_S, _JUDGE_S = 1.0, 0.5
_PATIENCE_S = 3.0
"""Time given to the coordinator to answer, and to other processes to read a failure."""


class ProcessWatchdog:
    """Watch the other processes of a run; use as a context manager around everything that they do together.

    It ends this process with exit code 75 if another one is lost, and with the other's exit code if it has failed.

    Args:
        silence_s: seconds without a heartbeat after which a process counts as lost.
        before_end: called with the reason before it ends this process, for process 0 some seconds before.
        parting: what it says last when it ends this process.
    """

    def __init__(
        self,
        processes: Processes,
        *,
        silence_s: float,
        before_end: Callable[[str], None] = lambda _: None,
        parting: str = SAVED_STAYS,
    ) -> None:
        self._processes, self._silence_s, self._before_end = processes, silence_s, before_end
        self._parting = parting
        self._client: Any = None
        now = time.monotonic()
        self._answered_s = now
        self._heartbeats = dict.fromkeys(range(processes.count), ("", now))
        self._failed: dict[int, tuple[int, str]] = {}
        self._ended, self._is_done = threading.Event(), False
        self._leaving = threading.Lock()

    def __enter__(self) -> Self:
        self._client = coordination_client()
        now = self._answered_s = time.monotonic()
        self._heartbeats = dict.fromkeys(self._heartbeats, ("", now))
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"process watchdog: {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._wait_for_all()
            self._ended.set()
            return
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End this process, and so all of them, for an error; if it follows from a lost process, in its name."""
        if _is_of_jax(error):
            # jax's error does not name the process that was lost. The threads find it and end this process, so this
            # waits longer than they need.
            time.sleep(self._silence_s + 3 * _PATIENCE_S)
        self._fail(error)

    def explain_abort(self) -> tuple[str, int] | None:
        """Return a message and an exit code for an abort by jax, or None if no other process is at fault."""
        if self._client is None:
            return self._explain_stop("a process has ended while all joined"), EXIT_LOST
        if found := self._find_failure():
            return found
        try:
            socket.create_connection((self._processes.host, self._processes.port), _PATIENCE_S).close()
        except OSError:
            coordinator = f"{self._name(0)}, the coordinator at {self._processes.coordinator},"
            return self._explain_stop(f"{coordinator} died"), EXIT_LOST
        # jax may notice a loss earlier than `silence_s`, so a shorter silence counts here.
        lost = self._find_lost(time.monotonic(), silence_s=_PATIENCE_S)
        return (self._explain_stop(lost), EXIT_LOST) if lost else None

    def _exchange(self) -> None:
        number = 0
        while not self._ended.wait(_HEARTBEAT_S):
            number += 1
            self._send_heartbeat(number)
            self._read_heartbeats()

    def _send_heartbeat(self, number: int) -> None:
        heartbeat = f"{socket.gethostname()} {os.getpid()} {_DONE if self._is_done else number}"
        # An error is not judged here: only the time since the last answer is.
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEARTBEATS}{self._processes.index}", heartbeat, allow_overwrite=True)

    def _read_heartbeats(self) -> None:
        try:
            heartbeats, failed = self._client.key_value_dir_get(_HEARTBEATS), read_failures()
        except Exception:
            return
        now = self._answered_s = time.monotonic()
        for key, text in heartbeats:
            index = int(key.rpartition("/")[2])
            if self._heartbeats[index][0] != text:
                self._heartbeats[index] = (text, now)
        self._failed = failed

    def _judge(self) -> None:
        judged_s = time.monotonic()
        while not self._ended.wait(_JUDGE_S):
            now = time.monotonic()
            if now - judged_s > self._silence_s / 2:
                # This process itself was suspended, so its view of the others is out of date: start over.
                self._answered_s = now
                self._heartbeats = {index: (text, now) for index, (text, _) in self._heartbeats.items()}
            judged_s = now
            if found := self._find_failure():
                self._leave(*found)
            elif lost := self._find_lost(now, silence_s=self._silence_s):
                self._leave(self._explain_stop(lost), EXIT_LOST)

    def _find_failure(self) -> tuple[str, int] | None:
        """Return a message and the exit code for a failure that a process has announced, its own one first."""
        own = self._processes.index
        for index, (code, text) in sorted(self._failed.items(), key=lambda item: item[0] != own):
            return (f"{text}\n" if index == own else self._explain_stop(f"{self._name(index)} failed: {text}")), code
        return None

    def _find_lost(self, now: float, *, silence_s: float) -> str:
        if now - self._answered_s > silence_s:
            return f"{self._name(0)} has not answered for {now - self._answered_s:.0f} s: it died or stands still"
        for index, (text, heard) in self._heartbeats.items():
            if index != self._processes.index and not text.endswith(_DONE) and now - heard > silence_s:
                return f"{self._name(index)} has said nothing for {now - heard:.0f} s: it died or stands still"
        return ""

    def _name(self, index: int) -> str:
        parts = self._heartbeats[index][0].split()
        place = f" (process id {parts[1]} on {parts[0]})" if len(parts) == 3 else ""
        return f"process {index} of {self._processes.count}{place}"

    def _explain_stop(self, why: str) -> str:
        first_line = why.splitlines()[0].rstrip(".")
        return f"{first_line}. {self._name(self._processes.index)} stops; {self._parting}.\n"

    def _wait_for_all(self) -> None:
        """Wait until all processes are done, so that one that fails in its last work alone still ends the others."""
        self._is_done = True
        self._send_heartbeat(0)
        while not all(text.endswith(_DONE) for text, _ in self._heartbeats.values()):
            time.sleep(0.05)
            self._read_heartbeats()

    def _fail(self, error: BaseException) -> None:
        """Announce an error of this process to the others, and end it."""
        index, code = self._processes.index, _exit_code(error)
        # From here on the threads must not end this process because of its own failure.
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()
        text = f"{type(error).__name__}: {error}"
        announce_failure(error, code=code)
        # If all processes make the same mistake, only the first one prints it.
        is_told = index > 0 and code == _EXIT_MISTAKE and self._first_says(text)
        trace = "".join(tracebacks.format_exception(error)) if code == _EXIT_FAULT else f"{text}\n"
        self._end("" if is_told else trace, code)

    def _first_says(self, text: str) -> bool:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and 0 not in self._failed:
            time.sleep(0.1)
            self._read_heartbeats()
        # The class of the error is left out: an error that the first process passes on has another class elsewhere.
        said = self._failed.get(0, (0, ""))[1].partition("\n")[0].partition(": ")[2]
        return said != "" and said in text

    def _leave(self, text: str, code: int) -> None:
        if self._leaving.acquire(blocking=False):
            self._end(text, code)

    def _end(self, text: str, code: int) -> None:
        # A closed or full stream must not keep the process alive.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        with contextlib.suppress(Exception):
            self._before_end(text.strip())
        if self._processes.index == 0:
            # The coordinator ends with this process, and jax would abort the others before they have read the failure.
            time.sleep(_PATIENCE_S + _HEARTBEAT_S)
        # Not sys.exit: Python would wait for the others at jax's shutdown barrier.
        os._exit(code)


def _is_of_jax(error: BaseException | None) -> bool:
    """Return whether an error is one of jax's runtime, or was caused by one."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_code(error: BaseException) -> int:
    if isinstance(error, TrellaxError):
        return _EXIT_MISTAKE
    return _EXIT_FAULT if isinstance(error, Exception) else _EXIT_INTERRUPTED
