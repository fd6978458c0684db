"""Open files from elsewhere safely: opening one cannot wait, reading one cannot fill memory, and links can be refused.

Folders with models are copied between people. One of their files may be a named pipe, which blocks the
process that opens it, a device, which has no end, or a sparse file, which is larger than memory.
"""

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, TrellaxError

Links = Literal["follow", "refuse"]
"""Treatment of a file that is a symbolic link; folders on the way to it may be links in either case."""


def open_regular(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    links: Links = "follow",
    error: type[TrellaxError] = CheckpointError,
) -> BufferedReader:
    """Open a regular file for reading, without waiting.

    Raises:
        TrellaxError: of the class `error`: it is not a regular file, has more than `max_bytes`, or is a refused link.
        OSError: the system refuses; FileNotFoundError if there is no such file.
    """
    file = Path(path)
    # Checked before it is opened, since opening a device may already do something, and again once it is open, since
    # it may have been replaced in between.
    _check(file, file.lstat() if links == "refuse" else file.stat(), max_bytes=max_bytes, error=error)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if links == "refuse" else 0)
    opened = os.fdopen(os.open(file, flags), "rb")
    try:
        _check(file, os.fstat(opened.fileno()), max_bytes=max_bytes, error=error)
    except TrellaxError:
        opened.close()
        raise
    return opened


def read_bounded(
    path: str | Path,
    *,
    max_bytes: int,
    links: Links = "follow",
    error: type[TrellaxError] = CheckpointError,
) -> bytes:
    """Read a regular file of at most `max_bytes`.

    Raises:
        TrellaxError: of the class `error`: it is not a regular file, is too large, or is a refused link.
        OSError: the system refuses; FileNotFoundError if there is no such file.
    """
    with open_regular(path, max_bytes=max_bytes, links=links, error=error) as file:
        content = file.read(max_bytes + 1) or b""  # None from a file of /proc without content yet
    if len(content) > max_bytes:
        # It has grown, or is one of the files in /proc whose size is 0.
        raise _too_large(Path(path), len(content), max_bytes=max_bytes, error=error)
    return content


def walk_folder(folder: str | Path, *, max_depth: int) -> Iterator[os.DirEntry[str]]:
    """Yield all entries below a folder, down to a depth; links are yielded and not followed.

    Args:
        max_depth: 1 for the folder's own entries, 2 for those of its folders as well.

    Raises:
        OSError: the system refuses.
    """
    waiting = [(str(folder), 1)]
    while waiting:
        path, depth = waiting.pop()
        with os.scandir(path) as found:
            entries = list(found)
        yield from entries
        if depth < max_depth:
            waiting += [(entry.path, depth + 1) for entry in entries if entry.is_dir(follow_symlinks=False)]


def name_kind(mode: int) -> str:
    """Return the kind of file that a mode (`st_mode`) is of, such as "a folder"; "" for a regular file."""
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "")


def _check(file: Path, found: os.stat_result, *, max_bytes: int | None, error: type[TrellaxError]) -> None:
    if kind := name_kind(found.st_mode):
        raise error(f"{file} is {kind}, where a file should be.", fix="put a copy of the file itself in its place.")
    if max_bytes is not None and found.st_size > max_bytes:
        raise _too_large(file, found.st_size, max_bytes=max_bytes, error=error)


def _too_large(file: Path, size: int, *, max_bytes: int, error: type[TrellaxError]) -> TrellaxError:
    return error(
        f"{file} has {size:,} bytes or more; such a file has at most {max_bytes:,}.",
        fix="put the file that belongs there in its place.",
    )
