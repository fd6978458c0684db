"""A model's own tokenizer: text files as token ids, kept beside the run so that the next start reads them from disk.

tokenizer.json is read by the library that wrote it. Read `data.py` next.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ..meshes import DataError
from .own_file import open_own
from .regular_file import open_regular
from .save_folder import free_name

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What belongs to a tokenizer in the folder of a model; copied along with weights."""

ORIGIN = "hf_config.json"
"""The config.json that a run folder's model came with."""

_BATCH = 256
TOKENS_FOLDER = "tokens"
"""What a run folder calls the folder of its tokenized text."""


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer, how many ids it may give, and the ids that end a text of its model, if anything says so."""

    tokenizer: Any
    file: Path
    vocab_size: int
    end_ids: tuple[int, ...]

    @property
    def end_id(self) -> int | None:
        """The id that ends a document, None where nothing says so."""
        return self.end_ids[0] if self.end_ids else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it.

        Raises:
            DataError: the tokenizer has no token for a part of it.
        """
        return self._encode([text], special="without")[0].ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the tokenizer puts before one.

        Raises:
            DataError: the tokenizer has no token for a part of it.
        """
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, each as `encode_prompt` has it.

        Raises:
            DataError: the tokenizer has no token for a part of one.
        """
        found = []
        for encoding in self._encode(texts, special="with"):
            ids = encoding.ids
            # Special tokens behind the text would say that it is at its end.
            while ids and encoding.special_tokens_mask[len(ids) - 1]:
                ids.pop()
            found.append(ids)
        return found

    def _encode(self, texts: Sequence[str], *, special: Literal["with", "without"]) -> Any:
        try:
            return self.tokenizer.encode_batch(list(texts), add_special_tokens=special == "with")
        except Exception as error:  # the library raises no class of its own
            raise DataError(
                f"{self.file} cannot read this text: {error}.", fix="take the model's own tokenizer."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> ModelTokenizer:
    """Return the tokenizer of a tokenizer.json, or of a folder that has one.

    A text ends with the `eos_token` of tokenizer_config.json beside it, or an `eos_token_id` of generation_config.json
    or config.json; the first of these ends a document.

    Raises:
        DataError: there is none, or it is broken.
    """
    file = Path(path) / TOKENIZER if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(
            f"{file} is no tokenizer: there is no such file.",
            fix="name a tokenizer.json or the folder of a model that has one.",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no class of its own
        raise DataError(f"{file} is no tokenizer: {error}.", fix="name a tokenizer.json.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return ModelTokenizer(tokenizer=tokenizer, file=file, vocab_size=size, end_ids=_find_ends(file.parent, tokenizer))


def keep_tokenizer(path: str, folder: Path) -> None:
    """Copy the tokenizer of a run into its folder, so that whoever serves or exports the run finds it; bytes need none.

    Raises:
        DataError: there is none, or it is broken.
    """
    if path != "bytes":
        file = load_tokenizer(path).file
        copy_tokenizer(file.parent, folder)
        _copy(file, folder / TOKENIZER)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what belongs to a tokenizer from one folder to another, in place of what is there."""
    for name in TOKENIZER_FILES:
        _copy(source / name, target / name)
    if not (target / ORIGIN).exists():
        _copy(source / ORIGIN, target / ORIGIN)


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the config.json that a run folder's model came with; empty where it came from none."""
    return _read_json(folder / ORIGIN)


def tokenize(documents: Sequence[tuple[str, bytes]], tokenizer: ModelTokenizer, *, cache: Path | None) -> np.ndarray:
    """Return the ids of documents (name, UTF-8 text) one after another, each ended by `end_id` where there is one.

    They begin as prompts do. uint16 where the vocabulary allows, else uint32. With a folder as `cache` they are kept
    there, under a hash of text, tokenizer and what stands around a text, and mapped from there the next time.

    Raises:
        DataError: a document is no UTF-8.
    """
    if cache is None:
        return _encode(documents, tokenizer)
    file = cache / TOKENS_FOLDER / f"{_hash(documents, tokenizer)}.npy"
    kept = _open_tokens(file)
    if kept is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # All processes of a run come by here at once, and in containers they have one id.
        part = free_name(file.with_suffix(f".part-{socket.gethostname()}-{os.getpid()}"))
        with open_own(part, "xb") as stream:
            np.save(stream, _encode(documents, tokenizer))
        part.replace(file)
        kept = np.load(file, mmap_mode="r")
    return kept


def _open_tokens(file: Path) -> np.ndarray | None:
    """Return ids that were kept, or None where there are none or others: a run folder may come from elsewhere."""
    try:
        open_regular(file, links="refuse", error=DataError).close()
        kept = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, OverflowError):
        return None
    is_ids = isinstance(kept, np.memmap) and kept.ndim == 1 and kept.dtype in (np.uint16, np.uint32)
    return kept if is_ids else None


def _encode(documents: Sequence[tuple[str, bytes]], tokenizer: ModelTokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = np.array([] if tokenizer.end_id is None else [tokenizer.end_id], dtype)
    parts = []
    for batch in _batches(documents):
        for ids in tokenizer.encode_prompts(batch):
            parts += [np.array(ids, dtype), end]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _batches(documents: Sequence[tuple[str, bytes]]) -> Iterator[list[str]]:
    for start in range(0, len(documents), _BATCH):
        yield [_decode(name, text) for name, text in documents[start : start + _BATCH]]


def _decode(name: str, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: this is no UTF-8 text: {error.reason} at byte {error.start}.",
            fix="convert it, or set data.tokenizer='bytes'.",
        ) from None


def _hash(documents: Sequence[tuple[str, bytes]], tokenizer: ModelTokenizer) -> str:
    digest = hashlib.sha256(tokenizer.file.read_bytes())
    digest.update(f"{tokenizer.encode_prompt('')} {tokenizer.end_id}".encode())
    for _, text in documents:
        # The length too: the same bytes cut into other documents are other tokens.
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _find_ends(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    found = [tokenizer.token_to_id(text)] if isinstance(text, str) else []
    for name in ("generation_config.json", "config.json", ORIGIN):
        ids = _read_json(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    known = [one for one in found if type(one) is int and 0 <= one < 2**32 and tokenizer.id_to_token(one) is not None]
    return tuple(dict.fromkeys(known))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
