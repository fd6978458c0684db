"""Tokenize the texts of a unit into a shard, a batch of documents in memory at a time.

It runs in a process of its own, which imports no jax. Read `prepare_tokens.py` next.
"""

import array
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from ....hub.tokenized_text import decode_text
from ....hub.tokenizer import ModelTokenizer, load_tokenizer
from ....meshes.files.own_file import replace_file, replacing_file
from ..records.damage import Damage
from ..records.tables import Holds
from .units import Unit

BYTES = "bytes"
_FIX = "convert it, or leave --tokenizer out for bytes."

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 256
_HEADER_BYTES = 128
"""Bytes before the data of an .npy file of one dimension: numpy leaves room for a larger shape."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """How units become shards: the folder, the tokenizer (its path, or "bytes"), and the field of records.

    holds: what the records are; of chats, a mask beside the tokens says which of them are answers.
    made_of: what the tokens follow from; another tokenizer under the same path is another one.
    """

    folder: Path
    tokenizer: str
    field: str
    holds: Holds = "text"
    made_of: str = ""


def write_shard(job: ShardJob, number: int, unit: Unit) -> dict[str, Any]:
    """Write the files of a shard, and return what the index says of it; it is kept in the folder until the index is.

    Raises:
        DataError: a file cannot be read, or is no UTF-8.
        OSError: the folder cannot be written.
    """
    tokens, mask = f"tokens-{number:05}.npy", f"tokens-{number:05}.mask.npy"
    names = {"tokens": tokens, "documents": f"documents-{number:05}.npy"}
    tokenizer = None if job.tokenizer == BYTES else _load(job.tokenizer, job.made_of)
    damage, ends, largest, text_bytes = Damage(), array.array("q"), -1, 0
    with ExitStack() as stack:
        array_of_tokens = stack.enter_context(_append_to(job.folder / tokens, dtype_of(tokenizer)))
        counts = stack.enter_context(_append_to(job.folder / mask, np.dtype(np.uint8))) if job.holds != "text" else None
        for document in _tokenize(job, unit, tokenizer, damage):
            text_bytes += document.num_bytes
            if not document.ids.size:
                continue
            array_of_tokens.append(document.ids)
            if counts is not None:
                counts.append(document.mask)
            ends.append(array_of_tokens.size - 1)
            largest = max(largest, int(document.ids.max()))
    with replacing_file(job.folder / names["documents"]) as file:
        np.save(file, np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64))
    entry: dict[str, Any] = names | {"num_tokens": array_of_tokens.size, "sha256": array_of_tokens.sha256}
    if counts is not None:
        entry |= {"mask": mask, "mask_sha256": counts.sha256}
    entry |= {"num_documents": len(ends), "text_bytes": text_bytes, "largest_id": largest}
    entry |= {"num_records": damage.num_records, "num_damaged": damage.num_damaged, "places": damage.places}
    replace_file(entry_path(job.folder, number), json.dumps(entry).encode())
    return entry


def entry_path(folder: Path, number: int) -> Path:
    """Return the file that keeps the entry of a shard until the index is written."""
    return folder / f"shard-{number:05}.json"


def dtype_of(tokenizer: ModelTokenizer | None) -> np.dtype:
    """Return the type of token ids; None is the tokenizer of bytes."""
    if tokenizer is None:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The token ids of a document, the bytes of its text, and of a chat which tokens are answers."""

    ids: np.ndarray
    num_bytes: int
    mask: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))


def _tokenize(job: ShardJob, unit: Unit, tokenizer: ModelTokenizer | None, damage: Damage) -> Iterator[_Document]:
    if job.holds == "text":
        for batch in _batches(unit.read(field=job.field, damage=damage)):
            yield from _encode(batch, tokenizer, dtype_of(tokenizer))
        return
    # Not at the top: jinja2 is of an extra.
    from ..chats import read_template, tokenize_chats

    assert tokenizer is not None
    chats = unit.read_chats(field=job.field, template=read_template(tokenizer), damage=damage)
    for text, tokens in tokenize_chats(chats, tokenizer):
        yield _Document(ids=tokens.ids, mask=tokens.mask, num_bytes=len(text.encode()))


@cache
def _load(path: str, _made_of: str) -> ModelTokenizer:
    return load_tokenizer(path)


def _batches(documents: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    num_bytes = 0
    for name, text in documents:
        batch.append((name, text))
        num_bytes += len(text)
        if num_bytes >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[str, bytes]], tokenizer: ModelTokenizer | None, dtype: np.dtype) -> Iterator[_Document]:
    """Yield the documents of a batch, their ids as `corpus.py` and `hub/tokenized_text.py` give them."""
    if tokenizer is None:
        for _, text in batch:
            ended = text if text.endswith(b"\n") or not text else text + b"\n"
            yield _Document(ids=np.frombuffer(ended, dtype), num_bytes=len(text))
        return
    ends = [] if tokenizer.special.end_id is None else [tokenizer.special.end_id]
    found = tokenizer.encode_prompts([decode_text(name, text, fix=_FIX) for name, text in batch])
    for (_, text), ids in zip(batch, found, strict=True):
        yield _Document(ids=np.array([*ids, *ends], dtype), num_bytes=len(text))


class _GrowingArray:
    """An .npy file of one dimension that is written in pieces."""

    def __init__(self, file: IO[bytes], dtype: np.dtype) -> None:
        self._file, self._dtype, self._digest, self.size = file, dtype, hashlib.sha256(), 0
        file.write(bytes(_HEADER_BYTES))

    def append(self, piece: np.ndarray) -> None:
        """Write numbers at the end."""
        self._file.write(piece.data)
        self._digest.update(piece.data)
        self.size += piece.size

    @property
    def sha256(self) -> str:
        """The hash of the numbers."""
        return self._digest.hexdigest()

    def finish(self) -> None:
        """Write the header, which holds the size."""
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() == _HEADER_BYTES


@contextmanager
def _append_to(path: Path, dtype: np.dtype) -> Iterator[_GrowingArray]:
    with replacing_file(path) as file:
        growing = _GrowingArray(file, dtype)
        yield growing
        growing.finish()
