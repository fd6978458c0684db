"""Runs that can be killed by the dozen: a process with everything imported that forks one for every command line.

Importing jax, orbax and grain takes longer than such a run itself. The zygote has started no backend, so a fork of it
is as good as a new process. Run as a script it reads commands as JSON from stdin.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Child:
    """A `trellax` command in a process of its own, with its output in files."""

    pid: int
    out: Path
    err: Path

    def said(self) -> str:
        # A device such as /dev/full has no end.
        return self.err.read_text(errors="replace") if self.err.is_file() else ""

    def wait_for(self, text: str, *, seconds: float = 120) -> None:
        """Wait until stderr holds the text."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end, f"no {text!r} within {seconds} s:\n{self.said()}"
            assert is_alive(self.pid), f"ended without {text!r}:\n{self.said()}"
            time.sleep(0.01)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if is_alive(self.pid):
            os.kill(self.pid, number)


class Zygote:
    """The parent of the children; use as a context manager."""

    def __init__(self, folder: Path, *, cache: Path) -> None:
        self._folder, self._count = folder, 0
        own = {"PYTHONPATH": str(ROOT / ".src"), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        flags = "--xla_backend_optimization_level=0"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own | {"XLA_FLAGS": flags, "NPROC": "4"},
        )

    def start(
        self,
        words: str | Sequence[str],
        *,
        largest_file: int | None = None,
        out: Path | None = None,
        err: Path | None = None,
    ) -> Child:
        """Start a command.

        Args:
            largest_file: the system refuses to write longer files.
            out: a device for stdout.
            err: a pipe or a device for stderr.
        """
        self._count += 1
        out, err = out or self._folder / f"{self._count}.out", err or self._folder / f"{self._count}.err"
        words = words.split() if isinstance(words, str) else list(words)
        answer = self._ask({"words": words, "out": str(out), "err": str(err), "largest_file": largest_file})
        return Child(answer, out, err)

    def wait(self, child: Child, *, seconds: float = 120) -> int:
        """Return the exit code of a child; -9 for one that was killed."""
        end = time.monotonic() + seconds
        while (code := self._ask({"wait": child.pid})) == 999:
            assert time.monotonic() < end, f"still running after {seconds} s:\n{child.said()}"
            time.sleep(0.02)
        return code

    def run(self, words: str | Sequence[str], *, seconds: float = 120) -> tuple[int, Child]:
        """Run a command to its end."""
        child = self.start(words)
        return self.wait(child, seconds=seconds), child

    def _ask(self, question: dict) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout
        self._process.stdout.close()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def serve() -> None:
    import matplotlib.figure  # noqa: F401
    from trellax.commands import cli

    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            pid, status = os.waitpid(question["wait"], os.WNOHANG)
            children.discard(pid)
            answer(os.waitstatus_to_exitcode(status) if pid else 999)
            continue
        pid = os.fork()
        if pid == 0:
            become(question, cli.main)
        children.add(pid)
        answer(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def become(question: dict, main: Callable[[list[str]], int]) -> None:
    import resource

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if question["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (question["largest_file"],) * 2)
    # As a program of its own ends: with its exit handlers.
    sys.exit(main(question["words"]))


if __name__ == "__main__":
    serve()
