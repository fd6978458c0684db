"""Write arrays to files and read them back with Orbax, which only this file imports.

A folder of arrays is written in the background and renamed when it is complete. Every process writes and reads only its
own shards.
"""

import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

_ITEM = "state"
_LARGE_BYTES = 1 << 24
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]|\[OS error (\d+):", re.IGNORECASE)


def save_arrays(folder: Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Start to write arrays into a new folder. Return once they may be changed, with a function that waits for the end.

    Orbax writes under another name until the end, so a killed process leaves nothing under `folder`.
    """
    # Orbax logs every error that it raises, with the tracebacks of all threads.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    context: Any = ocp.Context()
    # Replicas share the writing of an array by slices, and each slice compiles a program: only for large arrays.
    context.array.saving.min_slice_bytes_for_replica_parallel = _LARGE_BYTES
    if glob.escape(str(folder)) != str(folder):
        # Orbax finds the files to merge by globbing the folder's path unescaped (`merge_ocdbt_per_process_files`): in
        # `a[1]` it finds and merges none, and no load can follow. With files for each array there is no merge.
        # TODO(trellax): delete once Orbax escapes the path.
        context.array.saving.use_ocdbt = False
        context.array.saving.array_metadata_store = None
    with context:
        return ocp.save_checkpointables_async(str(folder), {_ITEM: dict(arrays)}).result


def require_all(folder: Path, names: Collection[str]) -> None:
    """Raise unless a folder has the metadata that a load needs: one manifest of all arrays, or one file for each.

    Raises:
        FileNotFoundError: metadata is missing; the number of arrays without it is given.
    """
    store = folder / _ITEM
    if (store / "manifest.ocdbt").is_file():
        return
    if missing := [name for name in names if not (store / name / "zarr.json").is_file()]:
        problem = f"Orbax left no record of {len(missing)} of {len(names)} arrays, so none could be loaded"
        raise FileNotFoundError(errno.ENOENT, problem, str(store))


def load_arrays(folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the arrays of these paths, each sharded as its shape says; other arrays are not read."""
    context: Any = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(str(folder), {_ITEM: dict(shapes)})[_ITEM]


def explain_failure(error: BaseException) -> str:
    """Return the cause of an error in a few words; Orbax and TensorStore wrap the system's error in pages of text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if found := _OS_ERROR.search(text):
        return os.strerror(int(found[1] or found[2]))
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
