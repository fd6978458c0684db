"""A child that outlives its process by a moment, to say why it ended.

When the coordinator's process dies, jax's client aborts every other process at once, from C++ and without a name, and
its callback for that case throws (jax 0.10 and 0.12). The child sees its pipe close without a goodbye, tries the
coordinator, and says what it finds. Delete it when jax tells Python.
"""

import subprocess
import sys

from ..meshes import Processes

_CODE = """
import socket, sys
index, count, address = sys.argv[1:]
if sys.stdin.read() != "goodbye":
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
        text = f"process {index} of {count} was killed"
    except OSError:
        text = f"process 0 of {count}, the coordinator at {address}, died; process {index} was stopped"
    print(text + "; what is saved stays.", file=sys.stderr)
"""


class Witness:
    """The child of one process; the coordinator's own process needs none."""

    def __init__(self, processes: Processes) -> None:
        words = [str(processes.index), str(processes.count), processes.coordinator]
        self._child = (
            subprocess.Popen(
                [sys.executable, "-S", "-c", _CODE, *words], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            if processes.index
            else None
        )

    def let_go(self) -> None:
        """Tell the child that the process ends as it means to."""
        child, self._child = self._child, None
        if child is not None:
            child.communicate("goodbye")
