"""Write, read and verify the seal of a save: a record of its arrays and a hash of every file.

Orbax and safetensors do not detect a flipped byte. The seal is written last and holds a hash of itself; a save without
a seal was never finished. It is JSON, so reading it runs no code. Hashes detect damage, not forgery, so every field is
checked as well (`seal_fields.py`). Read `reader.py` next.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from ...meshes import CheckpointError
from ...meshes.files.regular_file import name_kind, open_regular, read_bounded, walk_folder
from .seal_fields import FIELD_CHECKS, MAX_DEPTH, is_count

SEAL_FILE = "seal.json"
SEAL_FORMAT = 1
"""The version of the record. A save of another version is an error; it is not skipped as damaged."""

PARAMS = "params."
"""Prefix of the paths of model parameters; all other arrays belong to the trainer."""

AVERAGE = "opt_state.2.average."
"""Prefix of the paths of the average of the parameters (`train.ema`), which the optimizer state of a run has last."""

_MAX_SEAL_BYTES = 1 << 26
_LARGE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The record of one save.

    Args:
        step: step of the save, which is also the name of its folder.
        saved_at: time in ISO 8601.
        config: config of the writer, tables of plain values; nothing here reads them.
        data: position of the writer in its data.
        arrays: type, shape and checksum of each array, by path.
        files: size and SHA-256 of each file, by name.
        format: version of this record.
    """

    step: int
    saved_at: str
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    arrays: Mapping[str, tuple[str, tuple[int, ...], str]]
    files: Mapping[str, tuple[int, str]]
    format: int = SEAL_FORMAT

    @property
    def has_params_alone(self) -> bool:
        """Whether the save holds only parameters, those of a model before its first step."""
        return all(path.startswith(PARAMS) for path in self.arrays)

    @property
    def num_bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(size for size, _ in self.files.values())


def hash_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size in bytes and SHA-256 of every file under a folder except the seal, by relative path."""
    entries = walk_folder(folder, max_depth=MAX_DEPTH)
    names = [Path(entry.path).relative_to(folder) for entry in entries if entry.is_file(follow_symlinks=False)]
    return {str(name): _hash_file(folder / name) for name in names if str(name) != SEAL_FILE}


def write_seal(folder: Path, seal: Seal) -> None:
    """Write the seal into the folder of an unfinished save.

    Raises:
        OSError: the file cannot be written.
    """
    record = asdict(seal)
    text = json.dumps({"sha256": _hash_record(record), "record": record}, indent=1)
    (folder / SEAL_FILE).write_text(text, encoding="utf-8")


def read_seal(folder: Path) -> tuple[Seal | None, str]:
    """Return the seal of a save and "", or None and the problem with it.

    A seal of another format is returned with empty fields: it is not damaged, so no older save may be read instead.
    """
    try:
        return _parse_record(_read_record(folder), name=folder.name), ""
    except FileNotFoundError:
        problem = f"{SEAL_FILE} is missing"
    except OSError as error:
        problem = f"{SEAL_FILE}: {error.strerror}"
    except CheckpointError as error:
        problem = error.problem.removeprefix(f"{folder}/").rstrip(".")
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = f"{SEAL_FILE} is no seal"
    return None, problem


def _read_record(folder: Path) -> Any:
    if folder.is_symlink():
        raise CheckpointError("it is a link")
    outer = json.loads(read_bounded(folder / SEAL_FILE, max_bytes=_MAX_SEAL_BYTES, links="refuse"))
    if _hash_record(outer["record"]) != outer["sha256"]:
        raise CheckpointError(f"{SEAL_FILE} is not what was written")
    return outer["record"]


def _parse_record(record: Any, *, name: str) -> Seal:
    """Return a record as a seal.

    Raises:
        CheckpointError: a field holds what no version of trellax writes.
    """
    found = record["format"]
    if is_count(found) and found != SEAL_FORMAT:
        # Nothing is known of the fields of another version, so none is checked.
        nothing: dict[str, Any] = {"config": {}, "data": {}, "arrays": {}, "files": {}}
        return Seal(step=0, saved_at="", format=found, **nothing)
    if type(found) is not int or record.keys() != {field.name for field in fields(Seal)}:
        raise CheckpointError(f"{SEAL_FILE} is no seal: it has other keys")
    if wrong := [field for field, is_right in FIELD_CHECKS.items() if not is_right(record[field])]:
        raise CheckpointError(f"{SEAL_FILE} is no seal: its {' and its '.join(wrong)} cannot be")
    if str(record["step"]) != name:
        raise CheckpointError(f"its seal is of step {record['step']}")
    return Seal(**record)


def find_damage(folder: Path, seal: Seal, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Return the problems with the files of a save, one line each; an empty list if it is whole.

    Args:
        share: (index, count) to check every count-th file only, so that processes can share the work.
    """
    # Names are read quickly, so every process looks at all of them; only the content is divided.
    if strangers := _find_strangers(folder):
        return strangers
    index, count = share
    # Sorted, so that all processes divide the files alike.
    problems = (_compare_file(folder, name, *seal.files[name]) for name in sorted(seal.files)[index::count])
    return [problem for problem in problems if problem]


def _find_strangers(folder: Path) -> list[str]:
    """Return a problem for each link, pipe or device: loading arrays would follow it, or wait without end."""
    try:
        entries = list(walk_folder(folder, max_depth=MAX_DEPTH))
        kinds = {entry.path: name_kind(entry.stat(follow_symlinks=False).st_mode) for entry in entries}
    except OSError as error:
        return [f"it cannot be read: {error.strerror}"]
    return [
        f"{Path(path).relative_to(folder)} is {kind}" for path, kind in kinds.items() if kind not in ("", "a folder")
    ]


def _compare_file(folder: Path, name: str, size: int, digest: str) -> str:
    try:
        with open_regular(folder / name, links="refuse") as file:
            here = os.fstat(file.fileno()).st_size
            # The size first: it needs no reading.
            if here != size:
                return f"{name} has {here:,} bytes, not {size:,}"
            if size > _LARGE_BYTES and _count_written(file, size) < size // 100:
                return f"{name} has {size:,} bytes, of which nearly none was ever written"
            file.seek(0)
            same = hashlib.file_digest(file, "sha256").hexdigest() == digest
            return "" if same else f"{name} has other bytes than were saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except CheckpointError:
        return f"{name} is no file"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _count_written(file: BinaryIO, size: int) -> int:
    """Return how many bytes of a file are on the disk: a sparse file of a tebibyte takes no space but hours to hash."""
    written, offset = 0, 0
    while offset < size:
        try:
            start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
        except OSError:
            break
        offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        written += offset - start
    return written


def _hash_file(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _hash_record(record: Any) -> str:
    # Sorted, so that the record as parsed has the same text, and hash, as the record as written.
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
