"""Worker processes that run measurements when a benchmark asks for them.

jax fixes the number of devices when a process starts, and a fair comparison takes turns between ways to compute. So a
benchmark keeps one worker process open for each number of devices, and sends each of them one question at a time. Both
sides exchange lines of JSON over the worker's stdin and stdout. Read `train_step.py` next, a worker.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

ROOT = Path(__file__).parents[2]
"""The root of the repository, from which workers import `benchmarks`."""

Malloc = Literal["huge", "default"]
"""Whether workers allocate memory in huge pages or as glibc does by default."""


class Worker:
    """A child process that runs one script of this folder on `num_devices` CPU devices.

    >>> with Worker("benchmarks.workers.train_step", num_devices=4) as worker:
    ...     worker.ask("compile", schedule="1f1b", num_microbatches=8)["temp_bytes"] > 0
    True
    """

    def __init__(self, module: str, *, num_devices: int, malloc: Malloc = "huge") -> None:
        command = [sys.executable, "-m", module, str(num_devices)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(malloc), text=True
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        """Call the worker's function `call` with these arguments and return its result.

        Raises:
            RuntimeError: the function failed, or the worker died; its messages are on stderr.
        """
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps({"call": call, "arguments": arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker died in {call}({arguments}) with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"worker failed in {call}({arguments}):\n{answer['error']}")
        return answer["value"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def serve(calls: Mapping[str, Callable[..., Any]]) -> None:
    """Answer questions in the worker until the benchmark closes the pipe."""
    # XLA may write to the real stdout, which would break the protocol: keep it for answers, and point stdout to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"value": calls[question["call"]](**question["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def start_devices(num_devices: int) -> None:
    """Make this worker's CPU devices; a single device keeps jax's own settings, which are its fastest."""
    import jax
    from trellax.meshes import use_fake_devices

    jax.config.update("jax_enable_compilation_cache", False)
    if num_devices > 1:
        use_fake_devices(num_devices)
    else:
        jax.config.update("jax_platforms", "cpu")


def find_modules(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the root of the repository on PYTHONPATH, so that `python -m benchmarks.x` works."""
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _environment(malloc: Malloc) -> dict[str, str]:
    """Return the parent's environment without variables that size thread pools, with the chosen malloc."""
    environment = {name: value for name, value in os.environ.items() if name not in {"NPROC", "GLIBC_TUNABLES"}}
    if malloc == "huge":
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return find_modules(environment)
