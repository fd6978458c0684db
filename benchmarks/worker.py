"""Processes that measure and answer: the number of devices is fixed for each process, and rounds must interleave.

Parent and child speak JSON lines over the child's stdin and stdout. Read `train_step.py` and `work_r1.py` next: the
two children.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

Malloc = Literal["huge", "default"]
"""How every worker allocates: huge pages, or as glibc does by itself."""


class Worker:
    """A child process that runs one script of this folder on `num_devices` CPU devices.

    >>> with Worker("train_step.py", num_devices=4) as worker:
    ...     worker.ask("compile", schedule="1f1b", num_microbatches=8)["temp_bytes"] > 0
    True
    """

    def __init__(self, script: str, *, num_devices: int, malloc: Malloc = "huge") -> None:
        command = [sys.executable, str(Path(__file__).with_name(script)), str(num_devices)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(malloc), text=True
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        """Return what the child's function `call` returns for these arguments.

        Raises:
            RuntimeError: the function failed, or the child died; its messages are on stderr.
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
    """Answer the parent's questions until it goes away; the child's side."""
    # XLA may write to the real stdout, which would break the protocol: keep it for answers, give others stderr.
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
    """Set up this child's CPU devices; a single device is left as jax makes it, at its own best."""
    import jax
    from trellax.meshes import use_fake_devices

    jax.config.update("jax_enable_compilation_cache", False)
    if num_devices > 1:
        use_fake_devices(num_devices)
    else:
        jax.config.update("jax_platforms", "cpu")


def _environment(malloc: Malloc) -> dict[str, str]:
    """The parent's environment without what would size thread pools, with the chosen malloc."""
    environment = {name: value for name, value in os.environ.items() if name not in {"NPROC", "GLIBC_TUNABLES"}}
    if malloc == "huge":
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return environment
