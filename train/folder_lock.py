"""Lock a run folder, so that two runs never write into it at once.

The lock is the kernel's (flock), which ends with the process, so it is never stale. The lock file also holds the
process id and host of the run, as JSON, for the message to a second run; it is emptied at a normal end.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from ..meshes import RunError
from ..meshes.files.own_file import open_own
from ..meshes.files.regular_file import open_regular

LOCK_FILE = "lock"
"""The name of the lock file in a run folder."""

_MAX_HOLDER_BYTES = 4096
_NOBODY = "another process"
"""The holder of a lock whose file names no process."""


@contextlib.contextmanager
def lock_folder(folder: Path, *, say: Callable[[str], object]) -> Iterator[None]:
    """Lock a run folder for this process inside the context.

    Args:
        say: called with a message if the run before was killed, so that its lock file still names it.

    Raises:
        RunError: another process has locked the folder; it is named.
        OSError: the lock file cannot be written.
    """
    # Opened without truncating it: a run that does not get the lock reads the holder's name.
    with open_own(folder / LOCK_FILE, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"the run folder {folder} is in use by {_read_holder(file)}.",
                fix="wait for that run, stop it, or set another run.name.",
            ) from None
        # The lock was free, so a name in the file is that of a run which could not remove it.
        if (before := _read_holder(file)) != _NOBODY:
            say(f"the run before, {before}, was killed or crashed")
        _write_holder(file, {"process": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        finally:
            _write_holder(file, None)


def find_holder(folder: Path) -> tuple[int, str] | None:
    """Return process id and host of the run that a lock file names, None if it names none; the lock is left alone.

    Raises:
        RunError: the lock is not a regular file.
    """
    try:
        with open_regular(folder / LOCK_FILE, links="refuse", error=RunError) as file:
            return _parse_holder(file.read(_MAX_HOLDER_BYTES))
    except OSError:
        return None


def _read_holder(file: IO[bytes]) -> str:
    file.seek(0)
    holder = _parse_holder(file.read(_MAX_HOLDER_BYTES))
    return f"process {holder[0]} on {holder[1]}" if holder else _NOBODY


def _parse_holder(content: bytes) -> tuple[int, str] | None:
    try:
        holder = json.loads(content)
        process, host = holder["process"], holder["host"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_ours = type(process) is int and 0 < process < 1 << 32 and re.fullmatch(r"[\w.-]{1,255}", str(host), re.ASCII)
    return (process, host) if is_ours else None


def _write_holder(file: IO[bytes], holder: Mapping[str, object] | None) -> None:
    file.truncate(0)
    if holder:
        file.write(json.dumps(holder).encode())
    file.flush()
