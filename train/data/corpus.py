"""Load a corpus of text or of token arrays as one array of tokens, split into a training and a held-out part.

The default corpus is the source code of Python's standard library, so nothing is downloaded. It differs between Python
versions, so a run prints the SHA-256 of its corpus. Read `batches.py` next.
"""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configs.corpus_paths import find_files
from ...configs.run_config import DataSection
from ...hub.tokenized_text import tokenize
from ...hub.tokenizer import ModelTokenizer, load_tokenizer
from ...meshes import DataError
from ...meshes.arguments import check_count
from ...meshes.errors import printable
from ...meshes.files.regular_file import read_bounded
from .corpus_files import check_text_file, check_token_file
from .documents import Documents
from .hashed_file import HashedFile

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_CHUNK = 1 << 24
_MOST_TEXT_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The token ids of a corpus for training and for validation, each [num_tokens], uint8, uint16 or uint32.

    `vocab_size_needed` is the smallest vocabulary that has an id for every token. `mapped` are the memory-mapped files,
    which are read during the whole run and must not change; the content of all other files is in memory. `documents`
    says where they end, counted from the start of `train`, if sequences are to be cut there.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str
    description: str
    vocab_size_needed: int
    mapped: tuple[HashedFile, ...] = ()
    documents: Documents | None = None

    def check_files(self) -> None:
        """Raise if a memory-mapped file is lost or has changed since it was hashed.

        Raises:
            DataError: a file is lost or changed.
        """
        for file in self.mapped:
            file.check()


def load_corpus(data: DataSection, *, vocab_size: int | None = None, cache: Path | None = None) -> Corpus:
    """Load the corpus that a config names, and hold out its last `val_fraction` for validation.

    A token file is memory-mapped; it is read through once, for its hash and its largest id.

    Args:
        vocab_size: the model's, so that tokenizing stops at the first text with a larger id.
        cache: run folder, in which token ids of text are cached; None caches nothing.

    Raises:
        DataError: a file is missing or empty, a glob matches nothing, an array has another type, a part is shorter
            than one sequence, or the tokenizer cannot be read or gives an id that the model does not have.
    """
    if vocab_size is not None:
        check_count("vocab_size", vocab_size, error=DataError)
    if data.source == "tokens":
        files = find_files(data.paths)
        mapped = HashedFile(files[0]) if len(files) == 1 else None
        what = f"tokens of {_count(len(files), 'array')}"
        return _cut(_map_tokens(files, data=data), what, Documents(end_id=data.end_id), data=data, mapped=mapped)
    if data.tokenizer == "bytes":
        documents, what = _read_documents(data)
        texts = _end_texts([text for _, text in documents])
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64) - 1
        return _cut(np.frombuffer(b"".join(texts), np.uint8), f"bytes of {what}", Documents(ends=ends), data=data)
    tokenizer = load_tokenizer(data.tokenizer)
    documents, what = _read_documents(data)
    tokens = tokenize(documents, tokenizer, cache=cache, vocab_size=vocab_size)
    mapped = HashedFile(Path(str(tokens.filename))) if isinstance(tokens, np.memmap) else None
    return _cut(tokens, f"{what} by {tokenizer.file}", _end_of(tokenizer, data), data=data, mapped=mapped)


def check_vocabulary(corpus: Corpus, *, vocab_size: int) -> None:
    """Raise unless the model has an embedding for every token of the corpus.

    Raises:
        DataError: a token id is at or above `vocab_size`.
    """
    largest = corpus.vocab_size_needed - 1
    if largest >= vocab_size:
        raise DataError(
            f"the corpus holds token id {largest}, but model.vocab_size={vocab_size} knows ids 0 to {vocab_size - 1}.",
            fix=f"set model.vocab_size={corpus.vocab_size_needed} or more, or check data.token_dtype.",
        )


def _read_documents(data: DataSection) -> tuple[list[tuple[str, bytes]], str]:
    """Return the names and contents of all files, and a description of them."""
    if data.source == "stdlib":
        return _read_stdlib()
    files = find_files(data.paths)
    return _read_text(files), _count(len(files), "text file")


def _end_of(tokenizer: ModelTokenizer, data: DataSection) -> Documents:
    """Return that documents end with the id that the config or the tokenizer names."""
    end_id = data.end_id if data.end_id >= 0 else tokenizer.special.end_id
    if data.packing == "on" and end_id is None:
        raise DataError(
            f"data.packing='on' cuts sequences at the ends of documents, and no file beside {tokenizer.file} names the "
            "token that ends one.",
            fix="name it: data.end_id=0, say.",
        )
    return Documents(end_id=end_id)


def _end_texts(texts: Sequence[bytes]) -> list[bytes]:
    """Return the texts that are not empty, with a line break after each that does not end with one but the last."""
    texts = [text for text in texts if text]
    return [*(text if text.endswith(b"\n") else text + b"\n" for text in texts[:-1]), *texts[-1:]]


def _read_stdlib() -> tuple[list[tuple[str, bytes]], str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in root.rglob("*.py") if _is_library(file.relative_to(root))]
    # In the order of the names' hashes the held-out tail is a random sample, not the modules from u to z.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    if not names:
        raise DataError(
            f"this Python has no sources of its standard library in {root}.",
            fix="set data.source='text' and data.paths.",
        )
    documents = [(name, (root / name).read_bytes()) for name in names]
    return documents, f"Python {sysconfig.get_python_version()}'s standard library, {_count(len(names), 'file')}"


def _is_library(name: Path) -> bool:
    # Build files (sysconfig data) hold paths of the machine, so they differ between equal Python versions.
    built = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
    return not built and _SKIPPED_FOLDERS.isdisjoint(name.parts)


def _read_text(files: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Read files whole and return names and contents; since all are in memory at once, too large ones are refused."""
    try:
        sizes = {file: file.stat().st_size for file in files}
        total = sum(sizes.values())
        if total > _MOST_TEXT_BYTES:
            largest = max(files, key=lambda file: sizes[file])
            raise DataError(
                f"data.paths: {_count(len(files), 'text file')} of {total:,} bytes, the largest {largest}; "
                f"text is read whole, at most {_MOST_TEXT_BYTES:,} bytes.",
                fix="save the token ids as arrays and set data.source='tokens': those stay on disk.",
            )
        for file in files:
            check_text_file(file)
        texts = {str(file): read_bounded(file, max_bytes=_MOST_TEXT_BYTES, error=DataError) for file in files}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    # Editors on Windows put a byte order mark before the text; it is not part of it.
    return [(name, text.removeprefix(codecs.BOM_UTF8)) for name, text in texts.items()]


def _map_tokens(files: Sequence[Path], *, data: DataSection) -> np.ndarray:
    parts = [_map_file(file, dtype=np.dtype(data.token_dtype)) for file in files]
    # One file stays memory-mapped; several are joined in memory.
    if len(parts) == 1:
        return parts[0]
    needed, memory = sum(part.nbytes for part in parts), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise DataError(
            f"data.paths: {_count(len(parts), 'array')} of {needed:,} bytes are joined in memory, and this machine has "
            f"{memory:,}.",
            fix="join them into one file, which stays on disk.",
        )
    joined = np.result_type(*parts)
    # numpy promotes uint64 and signed integers to float64, which cannot hold all ids.
    return np.concatenate(parts, dtype=joined if joined.kind in "ui" else np.int64, casting="unsafe")


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


def _cut(
    tokens: np.ndarray,
    description: str,
    documents: Documents,
    *,
    data: DataSection,
    mapped: HashedFile | None = None,
) -> Corpus:
    if not tokens.size:
        raise DataError(
            f"the corpus is empty: {description}, 0 tokens.", fix="name files that hold something in data.paths."
        )
    held_out = round(tokens.size * data.val_fraction)
    parts = {"training": tokens[: tokens.size - held_out], "validation": tokens[tokens.size - held_out :]}
    for name, part in parts.items():
        if part.size < data.seq_len + 1:
            raise DataError(
                f"the {name} part of the corpus has {part.size} of {tokens.size} tokens, but one sequence needs "
                f"data.seq_len + 1 = {data.seq_len + 1}.",
                fix=f"use more text, another data.val_fraction than {data.val_fraction:g}, or a shorter data.seq_len.",
            )
    sha256, largest = _scan(tokens)
    if mapped and isinstance(tokens, np.memmap):
        mapped.expect(sha256, offset=tokens.offset, num_bytes=tokens.nbytes)
    return Corpus(
        train=parts["training"],
        validation=parts["validation"],
        sha256=sha256,
        description=f"{description}, {tokens.size:,} tokens, {held_out:,} held out",
        vocab_size_needed=256 if tokens.dtype == np.uint8 else largest + 1,
        mapped=(mapped,) if mapped else (),
        documents=documents if data.packing == "on" else None,
    )


def _scan(tokens: np.ndarray) -> tuple[str, int]:
    digest, largest = hashlib.sha256(), 0
    for chunk in _chunks(tokens):
        if chunk.min() < 0:
            raise DataError(f"the corpus holds token id {chunk.min()}; ids start at 0.", fix="save unsigned integers.")
        largest = max(largest, int(chunk.max()))
        digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest(), largest


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, tokens.size, _CHUNK):
        yield tokens[start : start + _CHUNK]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
