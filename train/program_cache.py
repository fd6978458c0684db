"""The cache of compiled programs: one folder a user, shared by runs, in which nobody else can put a program.

An entry is native code that runs as it is, so it must not lie in a run folder, which is copied between people. jax
reads and writes the entries; `xla.py` calls this before jax starts.
"""

import os
import stat
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

FOLDER_VARIABLE = "TRELLAX_CACHE"
"""Environment variable: another folder for the cache, or `off`."""

MAX_BYTES = 4 << 30
"""Size that jax keeps the cache under, dropping what was not used for longest."""

_LOCK_FILE = ".lockfile"
"""What jax locks while it reads or writes an entry."""


def open_program_cache() -> str:
    """Let jax keep its programs in the user's cache; return why it does not, "" if it does or nobody wants it to.

    What the environment or jax's own configuration says already is left alone.
    """
    config: Any = jax.config
    wanted = os.environ.get(FOLDER_VARIABLE, "")
    if config.jax_compilation_cache_dir is not None or wanted == "off":
        return ""
    try:
        folder = _make_folder(Path(wanted) if wanted else _find_default())
        problem = find_stranger(folder)
        if not problem:
            _drop_halves(folder)
            config.update("jax_compilation_cache_dir", str(folder))
            config.update("jax_compilation_cache_max_size", MAX_BYTES)
            return ""
    except (OSError, RuntimeError) as error:
        # RuntimeError: a user without a home, or with one whose links go in circles.
        problem = str(error)
    return f"compiled programs are not kept: {problem}. Set {FOLDER_VARIABLE} to a folder of your own, or to off."


def find_stranger(folder: Path) -> str:
    """Return who else could put a file into a folder, or another folder in its place; "" if nobody could.

    Args:
        folder: absolute, without links in it.
    """
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to {folder}"
    return next((f"others can write to {place}" for place in folder.parents if _is_loose(place.stat().st_mode)), "")


def _is_loose(mode: int) -> bool:
    # In a sticky folder, as /tmp is, nobody renames what is another's.
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _find_default() -> Path:
    # By the XDG specification a relative path does not count.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "trellax" / "xla"


def _make_folder(path: Path) -> Path:
    """Make what is missing for this user alone, and return where it really is."""
    missing = [place for place in (path.absolute(), *path.absolute().parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    return path.resolve(strict=True)


def _drop_halves(folder: Path) -> None:
    """Remove entries of processes that were killed while they wrote: jax would try them at every start, in vain.

    jax writes when an entry was used after the entry itself, under a lock.
    """
    with FileLock(folder / _LOCK_FILE, timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
