"""The seal of a saved step: what it holds, and a hash of every file, so that damage cannot pass for a save.

Neither Orbax nor safetensors notice a flipped byte. The seal is written last and carries a hash of itself; a saved step
without one was never finished. It is JSON: reading a checkpoint runs no code. Read `checkpoint.py` next.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SEAL_FILE = "seal.json"
SEAL_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The record of one saved step.

    `arrays` maps a path to its type, shape and checksum, `files` a name to its size and SHA-256. `config` is the run's
    as plain values, `data` the position in the stream of batches and the SHA-256 of the corpus.
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
        """Whether this is a model before its first step: no optimizer, no place in the data."""
        return all(path.startswith("params.") for path in self.arrays)

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(size for size, _ in self.files.values())


def hash_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of every file under a folder but the seal, by name."""
    return {name: _hash_file(folder / name) for name in _list_files(folder) if name != SEAL_FILE}


def write_seal(folder: Path, seal: Seal) -> None:
    """Write the seal into a folder whose name does not count as a save yet."""
    record = asdict(seal)
    text = json.dumps({"sha256": _hash_record(record), "record": record}, indent=1)
    (folder / SEAL_FILE).write_text(text, encoding="utf-8")


def read_seal(folder: Path) -> tuple[Seal | None, str]:
    """Return the seal of a saved step, or None and what is wrong with it.

    A seal of another format is no damage: another trellax wrote it, and its caller must not take an older step for it.
    """
    try:
        outer = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        record = outer["record"]
        problem = "" if _hash_record(record) == outer["sha256"] else f"{SEAL_FILE} is not what was written"
        if not problem and record["format"] != SEAL_FORMAT:
            return Seal(**{field.name: record.get(field.name) for field in fields(Seal)}), ""
        seal = Seal(**record)
        if not problem and str(seal.step) != folder.name:
            problem = f"its seal is of step {seal.step}"
    except OSError as error:
        return None, f"{SEAL_FILE} is missing" if isinstance(
            error, FileNotFoundError
        ) else f"{SEAL_FILE}: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, f"{SEAL_FILE} is no seal"
    return (None, problem) if problem else (seal, "")


def find_damage(folder: Path, seal: Seal, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Return what is wrong with the files of a saved step, one text each; none if it is whole.

    Args:
        share: (index, count): look at every count-th file only, so that processes can share the work.
    """
    index, count = share
    found = []
    for name, (size, digest) in sorted(seal.files.items())[index::count]:
        path = folder / name
        try:
            here = path.stat().st_size
            if here != size:
                found.append(f"{name} has {here:,} bytes, not {size:,}")
            elif _hash_file(path)[1] != digest:
                found.append(f"{name} has other bytes than were saved")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def _list_files(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (str((Path(root) / name).relative_to(folder)) for name in names)


def _hash_file(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _hash_record(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
