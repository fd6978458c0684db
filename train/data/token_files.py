"""Memory-map files of token ids, and hash them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...meshes import DataError
from ...meshes.errors import printable
from .corpus_files import check_token_file
from .hashed_file import HashedFile
from .joined_tokens import JoinedTokens, Tokens

_CHUNK = 1 << 24


def map_files(files: Sequence[Path], *, dtype: np.dtype) -> Tokens:
    """Return the tokens of .npy files, and of raw files of type `dtype`, each memory-mapped.

    Raises:
        DataError: a file is not a row of token ids.
    """
    parts = [_map_file(file, dtype=dtype) for file in files]
    return parts[0] if len(parts) == 1 else JoinedTokens(parts)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What reading all tokens once gives: their SHA-256, their largest id, and the files that must not change."""

    sha256: str
    largest: int
    mapped: tuple[HashedFile, ...]


def scan_tokens(tokens: Tokens, *, files: Sequence[HashedFile] = ()) -> Scan:
    """Read all tokens once.

    Args:
        files: the files that are memory-mapped, opened before they were mapped so that no later write is missed.

    Raises:
        DataError: an id is negative, or a memory-mapped file changes meanwhile.
    """
    parts = tokens.parts if isinstance(tokens, JoinedTokens) else (tokens,)
    known = {file.path.absolute(): file for file in files}
    whole, largest, mapped = hashlib.sha256(), 0, []
    for part in parts:
        file = known.get(Path(str(part.filename))) if isinstance(part, np.memmap) else None
        # The hash of the one file is that of all tokens; several are promoted to one type for the latter.
        digest = whole if len(parts) == 1 else hashlib.sha256()
        for chunk in _chunks(part):
            if chunk.min() < 0:
                raise DataError(
                    f"the corpus holds token id {chunk.min()}; ids start at 0.", fix="save unsigned integers."
                )
            largest = max(largest, int(chunk.max()))
            digest.update(np.ascontiguousarray(chunk).data)
            if digest is not whole:
                whole.update(chunk.astype(tokens.dtype).data)
        if file is not None and isinstance(part, np.memmap):
            file.expect(digest.hexdigest(), offset=part.offset, num_bytes=part.nbytes)
            mapped.append(file)
    return Scan(sha256=whole.hexdigest(), largest=largest, mapped=tuple(mapped))


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, tokens.size, _CHUNK):
        yield tokens[start : start + _CHUNK]


def _map_file(file: Path, *, dtype: np.dtype) -> np.ndarray:
    size = file.stat().st_size
    if not size:
        return np.empty(0, dtype)
    if file.suffix == ".npy":
        tokens = _map_array(file)
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui" or not tokens.dtype.isnative:
            raise DataError(
                f"{file}: the array is {tokens.dtype}{list(tokens.shape)}; token ids are one row of whole numbers.",
                fix="save it as uint16 or uint32 with one dimension.",
            )
        return tokens
    check_token_file(file, dtype)
    if size % dtype.itemsize:
        raise DataError(
            f"{file}: {size} bytes are no whole number of {dtype} tokens: {size} / {dtype.itemsize} = "
            f"{size / dtype.itemsize:.2f}.",
            fix="set data.token_dtype to the type the file was written with.",
        )
    return np.memmap(file, dtype, mode="r")


def _map_array(file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    # The header is a Python literal that may hold anything, so numpy may raise any error while it parses it.
    except Exception as error:
        why = printable(str(error).partition("\n")[0].rstrip("."), limit=200) or type(error).__name__
        raise DataError(f"{file}: this is no .npy array: {why}.", fix="write it with numpy.save.") from None
