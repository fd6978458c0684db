"""The seal of a save: a record of its arrays and a hash of every file, so that damage is found.

Orbax and safetensors do not notice a flipped byte. The seal is written last and carries a hash of itself; a save
without one was never finished. It is JSON, so reading it runs no code. The hashes show that nothing was damaged, not
who wrote it, so every field is checked as well (`seal_fields.py`). Read `reader.py` next.
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
"""The version of the record; a save of another one is refused, not passed over."""

PARAMS = "params."
"""Start of the paths of a model's parameters; all other arrays belong to its trainer."""

_MAX_SEAL_BYTES = 1 << 26
_LARGE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The record of one save.

    Args:
        step: name of the save's folder.
        saved_at: time in ISO 8601.
        config: the writer's tables on what the arrays are of, plain values; nothing here reads them.
        data: the writer's table on where in its data it was.
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
        """Whether parameters are all that was saved: a model before its first step."""
        return all(path.startswith(PARAMS) for path in self.arrays)

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(size for size, _ in self.files.values())


def hash_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file under a folder but the seal, by name."""
    entries = walk_folder(folder, max_depth=MAX_DEPTH)
    names = [Path(entry.path).relative_to(folder) for entry in entries if entry.is_file(follow_symlinks=False)]
    return {str(name): _hash_file(folder / name) for name in names if str(name) != SEAL_FILE}


def write_seal(folder: Path, seal: Seal) -> None:
    """Write the seal into a folder whose name does not count as a save yet."""
    record = asdict(seal)
    text = json.dumps({"sha256": _hash_record(record), "record": record}, indent=1)
    (folder / SEAL_FILE).write_text(text, encoding="utf-8")


def read_seal(folder: Path) -> tuple[Seal | None, str]:
    """Return the seal of a save, or None and what is wrong with it.

    A seal of another format is returned without contents: it is not damaged, and an older save must not take its place.
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
    """Return what is wrong with the files of a save, one line each; none if it is whole.

    Args:
        share: (index, count): check every count-th file only, so that processes can share the work.
    """
    if strangers := _find_strangers(folder):
        return strangers
    index, count = share
    problems = (_compare_file(folder, name, *seal.files[name]) for name in sorted(seal.files)[index::count])
    return [problem for problem in problems if problem]


def _find_strangers(folder: Path) -> list[str]:
    """Return the links, pipes and the like: a loader of arrays would follow them, or wait without end."""
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
    """Return how many bytes of a file are on the disk: a hole of a tebibyte costs nothing, but hours to hash."""
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
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
