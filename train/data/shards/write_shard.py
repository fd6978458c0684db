"""Tokenize the texts of a unit into a shard, a batch of documents in memory at a time.

It runs in a process of its own, which imports no jax. Read `prepare_tokens.py` next.
"""

import array
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from ....hub.tokenized_text import decode_text
from ....hub.tokenizer import ModelTokenizer, load_tokenizer
from ....meshes.files.own_file import replace_file, replacing_file
from ..records.damage import Damage
from .units import Unit

BYTES = "bytes"
_FIX = "convert it, or leave --tokenizer out for bytes."

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 256
_HEADER_BYTES = 128
"""Bytes before the data of an .npy file of one dimension: numpy leaves room for a larger shape."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """How units become shards: the folder, the tokenizer (its path, or "bytes"), and the field of records."""

    folder: Path
    tokenizer: str
    field: str


def write_shard(job: ShardJob, number: int, unit: Unit) -> dict[str, Any]:
    """Write the files of a shard, and return what the index says of it; it is kept in the folder until the index is.

    Raises:
        DataError: a file cannot be read, or is no UTF-8.
        OSError: the folder cannot be written.
    """
    names = {"tokens": f"tokens-{number:05}.npy", "documents": f"documents-{number:05}.npy"}
    tokenizer = None if job.tokenizer == BYTES else _load(job.tokenizer)
    damage, ends, digest, largest, text_bytes = Damage(), array.array("q"), hashlib.sha256(), -1, 0
    dtype, num_tokens = dtype_of(tokenizer), 0
    with replacing_file(job.folder / names["tokens"]) as file:
        file.write(bytes(_HEADER_BYTES))
        for batch in _batches(unit.read(field=job.field, damage=damage)):
            for ids in _encode(batch, tokenizer, dtype):
                file.write(ids.data)
                digest.update(ids.data)
                num_tokens += ids.size
                ends.append(num_tokens - 1)
                largest = max(largest, int(ids.max()))
            text_bytes += sum(len(text) for _, text in batch)
        _write_header(file, dtype, num_tokens)
    with replacing_file(job.folder / names["documents"]) as file:
        np.save(file, np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64))
    counts = {"num_tokens": num_tokens, "num_documents": len(ends), "text_bytes": text_bytes, "largest_id": largest}
    damaged = {"num_records": damage.num_records, "num_damaged": damage.num_damaged, "places": damage.places}
    entry = names | counts | {"sha256": digest.hexdigest()} | damaged
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


@cache
def _load(path: str) -> ModelTokenizer:
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


def _encode(batch: list[tuple[str, bytes]], tokenizer: ModelTokenizer | None, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the ids of each document that has any, as `corpus.py` and `hub/tokenized_text.py` give them."""
    if tokenizer is None:
        for _, text in batch:
            if text:
                yield np.frombuffer(text if text.endswith(b"\n") else text + b"\n", dtype)
        return
    ends = [] if tokenizer.special.end_id is None else [tokenizer.special.end_id]
    for ids in tokenizer.encode_prompts([decode_text(name, text, fix=_FIX) for name, text in batch]):
        if found := [*ids, *ends]:
            yield np.array(found, dtype)


def _write_header(file: IO[bytes], dtype: np.dtype, size: int) -> None:
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)
    assert file.tell() == _HEADER_BYTES
