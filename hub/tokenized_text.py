"""Tokenize text documents, and cache the ids in the run folder, where the next start memory-maps them.

The cache is keyed by a hash of texts and tokenizer. Read `../train/data/corpus.py` next.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..meshes import DataError
from ..meshes.files.own_file import replacing_file
from ..meshes.files.regular_file import open_regular
from .tokenizer import ModelTokenizer

TOKENS_FOLDER = "tokens"
"""The name of the folder of tokenized text in a run folder."""

_BATCH = 256
"""Documents that are tokenized at a time."""

_FIX = "convert it, or set data.tokenizer='bytes'."


def tokenize(
    documents: Sequence[tuple[str, bytes]],
    tokenizer: ModelTokenizer,
    *,
    cache: Path | None,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Return the token ids of documents, one after another: uint16 where the vocabulary allows, else uint32.

    Each document gets the special tokens that the tokenizer puts before a text, and its end token if it has one.

    Args:
        documents: pairs of a name and a text in UTF-8.
        cache: run folder; the ids are cached in its folder `tokens`. None caches nothing.
        vocab_size: the vocabulary size of the model, if known.

    Raises:
        DataError: a document is not UTF-8, or has a token whose id is not below `vocab_size`.
    """
    if cache is None:
        return _encode(documents, tokenizer, vocab_size)
    file = cache / TOKENS_FOLDER / f"{_hash(documents, tokenizer)}.npy"
    kept = _open_tokens(file)
    if kept is not None:
        return kept
    ids = _encode(documents, tokenizer, vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    # All processes of a run may tokenize at once, and the last of them to rename its file wins: all are equal.
    with replacing_file(file, writers="many") as stream:
        np.save(stream, ids)
    return np.load(file, mmap_mode="r")


def _open_tokens(file: Path) -> np.ndarray | None:
    """Return cached ids, or None if the file holds none: a run folder may come from another person."""
    try:
        open_regular(file, links="refuse", error=DataError).close()
        kept = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, OverflowError):
        return None
    is_ids = isinstance(kept, np.memmap) and kept.ndim == 1 and kept.dtype in (np.uint16, np.uint32)
    return kept if is_ids else None


def _encode(documents: Sequence[tuple[str, bytes]], tokenizer: ModelTokenizer, vocab_size: int | None) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ends = [] if tokenizer.special.end_id is None else [tokenizer.special.end_id]
    parts = []
    for batch in _batches(documents):
        for ids in tokenizer.encode_prompts(batch):
            parts.append(np.array([*ids, *ends], dtype))
            _check_ids(parts[-1], tokenizer, vocab_size)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _check_ids(ids: np.ndarray, tokenizer: ModelTokenizer, vocab_size: int | None) -> None:
    if vocab_size is not None and (largest := ids.max(initial=0)) >= vocab_size:
        raise DataError(
            f"{tokenizer.file} gives id {largest} in these texts, but model.vocab_size={vocab_size} knows ids 0 to "
            f"{vocab_size - 1}.",
            fix=f"take the model's own tokenizer, or set model.vocab_size={tokenizer.vocab_size} or more.",
        )


def _batches(documents: Sequence[tuple[str, bytes]]) -> Iterator[list[str]]:
    for start in range(0, len(documents), _BATCH):
        yield [decode_text(name, text, fix=_FIX) for name, text in documents[start : start + _BATCH]]


def decode_text(name: str, text: bytes, *, fix: str = "convert it.") -> str:
    """Return a text in UTF-8 as a string.

    Raises:
        DataError: it is no UTF-8; the message names the text and the first wrong byte, and ends with the fix.
    """
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise DataError(f"{name}: this is no UTF-8 text: {reason}.", fix=fix) from None


def _hash(documents: Sequence[tuple[str, bytes]], tokenizer: ModelTokenizer) -> str:
    digest = hashlib.sha256(tokenizer.file.read_bytes())
    digest.update(f"{tokenizer.encode_prompt('')} {tokenizer.special.end_id}".encode())
    for _, text in documents:
        # The length too: the same bytes cut into other documents give other tokens.
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
