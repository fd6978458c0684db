"""Checks that the files of a corpus are what a run takes them for: plain text, or token ids of the type it says.

A file of another kind trains without an error, on braces or on compressed bytes, and a loss that stays high is all
that one sees. So each is looked at first: its name, its first bytes, what lies beside it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..meshes import DataError

_RECORDS = {".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".avro"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"SQLite format 3": "SQLite",
    b"\x93NUMPY": "numpy's .npy",
}
_WIDE_MAGIC = {20240520: "llm.c", 20240801: "llm.c"}
"""The first 32 bits of headers before token ids."""

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Type codes of the .idx files beside Megatron-LM's .bin files."""

_SAMPLE = 1 << 22
"""Bytes that are looked at."""

_FEWEST = 64
"""Tokens below which nothing can be guessed from them."""

_LARGEST_HALF = 7
"""Upper halves of ids of vocabularies up to 2**19 words, in 32 bits, are no larger."""


def check_named_once(paths: Sequence[str]) -> None:
    """Raise if `data.paths` names a file twice, as for a weight: files are read once.

    Raises:
        DataError: naming the path.
    """
    seen: dict[str, str] = {}
    for path in paths:
        first = seen.setdefault(str(Path(path).absolute()), path)
        if paths.count(first) > 1 or first != path:
            raise DataError(
                f"data.paths names {path!r} more than once; a file is read once, and counts once.",
                fix="name it once. To weigh it, write it into one file as often as it shall count.",
            )


def check_text_file(file: Path) -> None:
    """Raise if a file is no plain text, by its name or its first bytes: records, compressed or binary.

    Raises:
        DataError: naming the file and what it is.
    """
    head, suffix = _read_head(file, 16), file.suffix.lower()
    packed = _magic_of(head) or (f"compressed ({suffix})" if suffix in _COMPRESSED else None)
    if packed:
        raise DataError(
            f"{file}: this is no plain text, but {packed}; data.source='text' would train on its bytes.",
            fix="unpack it into text files, or leave it out of data.paths.",
        )
    if suffix in _RECORDS:
        raise DataError(
            f"{file}: {suffix} files hold records; data.source='text' would train on their braces and keys.",
            fix="write the text of the records into .txt files, or their token ids into an array for "
            "data.source='tokens'.",
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: this is text in UTF-16.", fix="convert it to UTF-8.")


def check_token_file(file: Path, dtype: np.dtype) -> None:
    """Raise if a raw file of token ids has a header, or says or looks like another type than `dtype`.

    Args:
        dtype: what `data.token_dtype` says.

    Raises:
        DataError: naming the file, the type and what speaks against it.
    """
    head = _read_head(file, _SAMPLE)
    if name := _magic_of(head):
        raise DataError(f"{file}: this is no raw array of token ids, but {name}.", fix="unpack it, or rename it.")
    if len(head) >= 4 and (name := _WIDE_MAGIC.get(int(np.frombuffer(head, "<u4", 1)[0]))):
        raise DataError(
            f"{file}: this begins with the header of {name}, 256 numbers that are no tokens.",
            fix="cut its first 1,024 bytes off, or save the tokens with numpy.save as .npy.",
        )
    for beside, said in _types_beside(file):
        if np.dtype(said).itemsize != dtype.itemsize:
            raise DataError(
                f"{file}: {beside.name} says {said}, but data.token_dtype='{dtype}'.",
                fix=f"set data.token_dtype to {_TYPE_OF.get(np.dtype(said).itemsize, 'what it says')}.",
            )
    if dtype.itemsize == 2 and file.stat().st_size % 4 == 0 and _looks_wide(head):
        raise DataError(
            f"{file}: every second uint16 is {_LARGEST_HALF} or less, so these look like uint32 ids; "
            "read as data.token_dtype='uint16' half of the tokens would be no tokens.",
            fix="set data.token_dtype='uint32'; if they are uint16, save them with numpy.save as .npy, which says so.",
        )


_TYPE_OF = {2: "'uint16'", 4: "'uint32'"}


def _looks_wide(head: bytes) -> bool:
    """Whether 16-bit numbers are the halves of 32-bit ids: those of upper halves are small, the others are not."""
    pairs = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
    if len(pairs) < _FEWEST:
        return False
    low, high = pairs[:, 0], pairs[:, 1]
    return bool(high.max() <= _LARGEST_HALF < low.max())


def _types_beside(file: Path) -> list[tuple[Path, str]]:
    """What the files beside a .bin file say of its type."""
    index, found = file.with_suffix(".idx"), []
    if index.is_file() and (code := _megatron_code(index)) in _MEGATRON_TYPES:
        found.append((index, _MEGATRON_TYPES[code]))
    for sidecar in (file.with_suffix(".json"), file.with_name(f"{file.name}.json")):
        said = _read_json(sidecar).get("dtype") if sidecar.is_file() else None
        if isinstance(said, str) and said in {"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"}:
            found.append((sidecar, said))
    return found


def _megatron_code(index: Path) -> int | None:
    head = _read_head(index, 18)
    # Magic, then a version in 64 bits, then the code.
    return head[17] if head.startswith(_MEGATRON_MAGIC) and len(head) == 18 else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(_read_head(file, _SAMPLE))
    except (DataError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _read_head(file: Path, num_bytes: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(num_bytes)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.", fix="check its permissions.") from None


def _magic_of(head: bytes) -> str | None:
    return next((name for start, name in _MAGIC.items() if head.startswith(start)), None)
