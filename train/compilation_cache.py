"""Enable jax's persistent compilation cache in a folder that only the user can write.

An entry is native code that is run without a check. So the cache is not in a run folder, which people copy from each
other, but in one folder per user, shared by all runs. `xla.py` calls this before jax's backend starts.
"""

import os
import stat
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

FOLDER_VARIABLE = "TRELLAX_CACHE"
"""Environment variable with another folder for the cache, or `off`."""

MAX_BYTES = 4 << 30
"""Largest size of the cache; jax evicts the least recently used entries."""

_LOCK_FILE = ".lockfile"
"""The file that jax locks while it reads or writes an entry."""


def enable_compilation_cache() -> str:
    """Enable the cache unless it is switched off, and return a warning if that failed, else "".

    A cache folder that jax's configuration already has is left alone.
    """
    config: Any = jax.config
    wanted = os.environ.get(FOLDER_VARIABLE, "")
    if config.jax_compilation_cache_dir is not None or wanted == "off":
        return ""
    try:
        folder = _make_folder(Path(wanted) if wanted else _find_default())
        problem = find_other_writer(folder)
        if not problem:
            _drop_incomplete_entries(folder)
            config.update("jax_compilation_cache_dir", str(folder))
            config.update("jax_compilation_cache_max_size", MAX_BYTES)
            return ""
    except (OSError, RuntimeError) as error:
        # RuntimeError: the user has no home folder, or one whose links form a circle.
        problem = str(error)
    return f"compiled programs are not kept: {problem}. Set {FOLDER_VARIABLE} to a folder of your own, or to off."


def find_other_writer(folder: Path) -> str:
    """Return why another user could write into a folder, or replace it by another one; "" if none could.

    Args:
        folder: absolute, without links in it.
    """
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {folder}"
    return next(
        (f"others can write to {place}" for place in folder.parents if _is_open_to_others(place.stat().st_mode)), ""
    )


def _is_open_to_others(mode: int) -> bool:
    # In a sticky folder, such as the one for temporary files, users cannot rename each other's files.
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _find_default() -> Path:
    # The XDG base directory specification says to ignore a relative path.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "trellax" / "xla"


def _make_folder(path: Path) -> Path:
    """Create the missing folders with access for this user alone, and return the path with its links resolved."""
    missing = [place for place in (path.absolute(), *path.absolute().parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    return path.resolve(strict=True)


def _drop_incomplete_entries(folder: Path) -> None:
    """Remove entries of processes that were killed while writing, which jax would try and fail to load at each start.

    jax writes `NAME-cache`, then `NAME-atime`, under a lock: an entry without the second file is incomplete.
    """
    with FileLock(folder / _LOCK_FILE, timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
