"""Files that a run writes into its own folder: never through a link, which would write somewhere else."""

import contextlib
import os
from pathlib import Path
from typing import IO, Any, Literal


def open_own(path: Path, mode: Literal["a+b", "xb"]) -> IO[Any]:
    """Return a file of the run's, opened to append (`a+b`) or made anew (`xb`); a link is refused.

    Raises:
        OSError: it is a link, it is there and should not, or the system refuses.
    """
    return open(path, mode, opener=_open_no_link)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what had its name before is gone, and a link's target is not touched.

    Raises:
        OSError: the system refuses.
    """
    part = path.with_name(path.name + ".part")
    # Left by a killed run, or put there by somebody: a name of ours all the same.
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    with open_own(part, "xb") as file:
        file.write(content)
    part.replace(path)


def identify_file(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from another of its name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def free_name(path: Path) -> Path:
    """Return the path, or the first of `path-2`, `path-3`, ... where it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))]
    return next(name for name in names if not os.path.lexists(name))
