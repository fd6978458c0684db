"""Check that the files of a corpus hold what the config says: plain text, or token ids of the given type.

A file of another kind would train without an error, on the braces of JSON or on compressed bytes, and the only symptom
would be a high loss. So the name, the first bytes and the files beside each file are checked before the run.
"""

import codecs
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ...meshes import DataError
from ...meshes.files.regular_file import open_regular

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
"""Programs whose token files begin with a header, by its first 32 bits."""

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Type codes of the .idx files beside Megatron-LM's .bin files."""

_SAMPLE, _TEXT_SAMPLE = 1 << 20, 1 << 16
"""Bytes that are read: of token ids at three places of the file, of text at its start."""

_FEWEST = 64
"""Smallest number of tokens to guess a type from."""

_LARGEST_HALF = 7
"""Largest upper half of a 32-bit id, for vocabularies of up to 2**19 words."""

_TYPE_OF = {"u2": "'uint16'", "u4": "'uint32'", "i4": "'uint32'"}


def check_text_file(file: Path) -> None:
    """Raise if the name or the first bytes of a file show that it is not plain text: records, compressed or binary.

    Raises:
        DataError: the file is not plain text; its kind is named.
    """
    head, suffix = _read_head(file, _TEXT_SAMPLE), file.suffix.lower()
    packed = _magic_of(head) or (f"compressed ({suffix})" if suffix in _COMPRESSED else None)
    if packed:
        raise DataError(
            f"{file}: this is no plain text, but {packed}; data.source='text' would train on its bytes.",
            fix="unpack it into text files, or leave it out of data.paths.",
        )
    if _is_records(head):
        raise DataError(
            f"{file}: its lines are JSON records; data.source='text' would train on their braces and keys.",
            fix="name it .jsonl: of those files the field data.text_field is read.",
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: this is text in UTF-16.", fix="convert it to UTF-8.")
    if b"\0" in head:
        raise DataError(
            f"{file}: this is no plain text: it has null bytes, as binary files and UTF-16 do.",
            fix="leave it out of data.paths, or convert it to UTF-8; arrays of ids are data.source='tokens'.",
        )


def check_token_file(file: Path, dtype: np.dtype) -> None:
    """Raise if a raw file of token ids has a header, or seems to hold another type than `dtype`.

    Args:
        dtype: the value of `data.token_dtype`.

    Raises:
        DataError: the file is not a raw array of this type; the evidence is named.
    """
    head = _read_head(file, _SAMPLE)
    if name := _magic_of(head) or ("text" if _is_text(head) else None):
        fix = "set data.source='text'." if name == "text" else "unpack it, or rename it."
        raise DataError(f"{file}: this is no raw array of token ids, but {name}.", fix=fix)
    if len(head) >= 4 and (name := _WIDE_MAGIC.get(int(np.frombuffer(head, "<u4", 1)[0]))):
        raise DataError(
            f"{file}: this begins with the header of {name}, 256 numbers that are no tokens.",
            fix="cut its first 1,024 bytes off, or save the tokens with numpy.save as .npy.",
        )
    for beside, said in _read_types_beside(file):
        if said.kind not in "ui" or said.itemsize != dtype.itemsize or not said.isnative:
            raise DataError(
                f"{file}: {beside.name} says {said}, but data.token_dtype='{dtype}'.",
                fix=f"set data.token_dtype to {_TYPE_OF.get(said.str[1:], 'what it says')}.",
            )
    if wide := _find_wider(file, dtype):
        fix = "save them with numpy.save as .npy, which says their type."
        if wide == np.uint32:
            fix = f"set data.token_dtype='uint32'; if they are {dtype}, {fix}"
        raise DataError(
            f"{file}: of every {wide.itemsize // dtype.itemsize} numbers of {dtype} all but one are {_LARGEST_HALF} or "
            f"less, so these look like {wide.name} ids{'' if wide.isnative else ' in the other byte order'}; "
            f"read as data.token_dtype='{dtype}' the others would be no tokens.",
            fix=fix,
        )


def _find_wider(file: Path, dtype: np.dtype) -> np.dtype | None:
    """Return a wider type whose ids look like pieces of `dtype` when they are read as that; None if there is none.

    Read as uint16, the uint32 ids 17, 70000 and 5 are 17 0 4464 1 5 0: in every pair one number is small. Ids that are
    uint16 have no such pattern.
    """
    size = file.stat().st_size
    for wide in map(np.dtype, ("<u8", ">u8", "<u4", ">u4")):
        pieces = wide.itemsize // dtype.itemsize
        if pieces < 2 or size % wide.itemsize:
            continue
        rows = np.frombuffer(_read_sample(file, size), dtype).reshape(-1, pieces)
        # The piece with the lowest bits may hold any number; all others are small, since real ids are.
        low = 0 if wide.str[0] == "<" else pieces - 1
        rest = int(np.delete(rows, low, axis=1).max(initial=0))
        # Where ids are small too, the others must all be 0, in a file of more than a few different numbers.
        is_piece = rest <= _LARGEST_HALF < rows[:, low].max(initial=0) or (rest == 0 and np.unique(rows).size > 3)
        if len(rows) >= _FEWEST and is_piece:
            return wide
    return None


def _read_types_beside(file: Path) -> list[tuple[Path, np.dtype]]:
    """Return the types that files beside a .bin file give for it, with their paths."""
    index, found = file.with_suffix(".idx"), []
    if index.is_file() and (code := _megatron_code(index)) in _MEGATRON_TYPES:
        found.append((index, np.dtype(_MEGATRON_TYPES[code])))
    for sidecar in (file.with_suffix(".json"), file.with_name(f"{file.name}.json")):
        said = _read_json(sidecar).get("dtype") if sidecar.is_file() else None
        with contextlib.suppress(TypeError, ValueError, SyntaxError):
            found += [(sidecar, np.dtype(said.removeprefix("np.")))] if isinstance(said, str) else []
    return found


def _megatron_code(index: Path) -> int | None:
    head = _read_head(index, 18)
    # The index begins with 9 bytes of magic and a version of 8 bytes; the type code follows.
    return head[17] if head.startswith(_MEGATRON_MAGIC) and len(head) == 18 else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(_read_head(file, _SAMPLE))
    except (DataError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _is_records(head: bytes) -> bool:
    """Return whether the first lines of a text are JSON objects."""
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()][:3]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _is_text(head: bytes) -> bool:
    """Return whether bytes are printable UTF-8, which an array of ids practically never is."""
    text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(head[: 1 << 12])
    return len(head) > 4 * _FEWEST and "\ufffd" not in text and text.translate(_SPACES).isprintable()


_SPACES = str.maketrans("\t\n\r\f\ufeff", "     ")


def _read_sample(file: Path, size: int) -> bytes:
    """Return bytes of the start, the middle and the end of a file, or all of a short one, in multiples of 8 bytes."""
    if size <= 3 * _SAMPLE:
        return _read_head(file, size)
    starts = (0, size // 16 * 8, size - _SAMPLE - size % 8)
    return b"".join(_read_head(file, _SAMPLE, start=start) for start in starts)


def _read_head(file: Path, num_bytes: int, *, start: int = 0) -> bytes:
    try:
        with open_regular(file, error=DataError) as stream:
            stream.seek(start)
            return stream.read(num_bytes) or b""  # None where a file of /proc has nothing to say
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.", fix="check its permissions.") from None


def _magic_of(head: bytes) -> str | None:
    return next((name for start, name in _MAGIC.items() if head.startswith(start)), None)
