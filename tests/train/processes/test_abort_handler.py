"""An abort from C ends the process with a message and an exit code, or aborts it if there is no message."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "train" / "processes" / "abort_handler.py"

# jax's client aborts from a thread of its own, while Python waits elsewhere.
CODE = """
import ctypes, runpy, threading, time
handle_aborts = runpy.run_path({file!r})["handle_aborts"]
with handle_aborts(lambda: {answer}):
    threading.Thread(target=ctypes.CDLL(None).abort).start()
    time.sleep(20)
"""


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [("('process 0 died', 75)", 75, "process 0 died"), ("None", -6, ""), ("1 / 0", -6, "")],
)
def test_abort_is_explained_where_another_process_is_at_fault(answer: str, code: int, text: str) -> None:
    words = [sys.executable, "-S", "-c", CODE.format(file=str(FILE), answer=answer)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (code, text)
