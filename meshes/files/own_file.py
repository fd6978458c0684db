"""Write our own files: whole or not at all, and never through a link, which leads somewhere else.

A file is written under another name in the same folder and then renamed, which replaces the old one in one step: a
reader finds the old content or the new, also after a crash. `new_folder.py` does the same for folders.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

Writers = Literal["one", "many"]
"""Whether one process at a time writes a file, as under a lock, or several may write it at once."""


def open_own(path: Path, mode: Literal["a+b", "xb"]) -> IO[Any]:
    """Open a file to append to it (`a+b`) or to create it (`xb`); a symbolic link is refused.

    Raises:
        OSError: it is a link, it exists already and must not, or the system refuses.
    """
    return open(path, mode, opener=_open_no_link)


def replace_file(path: Path, content: bytes, *, writers: Writers = "one") -> None:
    """Replace a file by one with this content, in one step. A link is replaced itself, not what it leads to.

    Raises:
        OSError: the system refuses.
    """
    with replacing_file(path, writers=writers) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_file(path: Path, *, writers: Writers = "one") -> Iterator[IO[bytes]]:
    """Yield a new file to write to, which replaces the one at `path` when the context ends without an error.

    Args:
        writers: with "one" the new file is `<path>.part` until then, and one left by a killed process is removed;
            with "many" each process has a name of its own.

    Raises:
        OSError: the system refuses.
    """
    part = path.with_name(f"{path.name}.part") if writers == "one" else name_part(path)
    if writers == "one":
        part.unlink(missing_ok=True)
    with open_own(part, "xb") as file:
        try:
            yield file
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    part.replace(path)


def name_part(path: Path) -> Path:
    """Return a free name beside `path` that no other process takes: containers have the same process ids."""
    return free_name(path.with_name(f"{path.name}.part-{socket.gethostname()}-{os.getpid()}"))


def free_name(path: Path) -> Path:
    """Return the path, or if it is taken the first free one of `path-2`, `path-3`, ..."""
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(name for name in names if not os.path.lexists(name))


def identify_file(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file or folder, by which a later one of its name differs; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_no_link(path: str, flags: int) -> int:
    # O_NONBLOCK, or to open a named pipe would wait for its reader.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
