"""A model's own tokenizer: text files as token ids, kept beside the run so that the next start reads them from disk.

tokenizer.json is read by the library that wrote it. Read `../train/data/corpus.py` next.
"""

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ..meshes import DataError
from ..meshes.files.own_file import free_name, open_own
from ..meshes.files.regular_file import open_regular
from .folder import MAX_TOKENIZER_BYTES, copy_file, read_file, read_json
from .special_ids import ORIGIN, SpecialIds, find_special_ids

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

_BATCH = 256
TOKENS_FOLDER = "tokens"
"""What a run folder calls the folder of its tokenized text."""
_TRIALS = ("", "a", "Hello, world! 12 \n\té")


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer, and the ids that begin and end texts of its model.

    `vocab_size` is one more than the largest id that it may give; a few may be ids that its model does not have.
    """

    tokenizer: Any
    file: Path
    vocab_size: int
    special: SpecialIds

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
            ids, mask = encoding.ids, encoding.special_tokens_mask
            # Special tokens behind the text would say that it is at its end.
            num_before = mask.index(0) if 0 in mask else self._num_before
            while len(ids) > num_before and mask[len(ids) - 1]:
                ids.pop()
            found.append(ids)
        return found

    @cached_property
    def _num_before(self) -> int:
        """How many special tokens come before a text: around an empty one nothing tells them from those behind."""
        try:
            return self._encode(["a"], special="with")[0].special_tokens_mask.index(0)
        except (DataError, ValueError):  # it has no token for this text
            return 0

    def _encode(self, texts: Sequence[str], *, special: Literal["with", "without"]) -> Any:
        try:
            return self.tokenizer.encode_batch(list(texts), add_special_tokens=special == "with")
        except BaseException as error:
            raise _explain(error, f"{self.file} cannot read this text") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out.

        Raises:
            DataError: the tokenizer fails on them.
        """
        try:
            with _quiet_panics():
                return self.tokenizer.decode(list(ids), skip_special_tokens=True)
        except BaseException as error:
            raise _explain(error, f"{self.file} cannot write this text") from None


def load_tokenizer(path: str | Path) -> ModelTokenizer:
    """Return the tokenizer of a tokenizer.json, or of a folder that has one.

    Raises:
        DataError: there is none, or it is broken.
    """
    file = Path(path) / TOKENIZER if Path(path).is_dir() else Path(path)
    content = _read_tokenizer(file, is_named=not Path(path).is_dir())
    if content is None:
        raise DataError(
            f"{file} is no tokenizer: there is no such file.",
            fix="name a tokenizer.json or the folder of a model that has one.",
        )
    try:
        with _quiet_panics():
            tokenizer = Tokenizer.from_buffer(content)
            # First, since a padding may be as long as it likes.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            _try_out(tokenizer)
    except BaseException as error:
        raise _explain(error, f"{file} is no tokenizer", fix=f"name a {TOKENIZER}.") from None
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = find_special_ids(file.parent, tokenizer)
    return ModelTokenizer(tokenizer=tokenizer, file=file, vocab_size=size, special=special)


def _read_tokenizer(file: Path, *, is_named: bool) -> bytes | None:
    """A file that was named itself may be a link to anywhere; one of a folder that was named, to files of that."""
    real = file.resolve() if is_named else file
    return read_file(real.parent, real.name, max_bytes=MAX_TOKENIZER_BYTES, error=DataError)


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keep the library's panics off stderr, where it prints stacks; for short, since other threads are mute too."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _try_out(tokenizer: Any) -> None:
    """Raise what panics there are in this tokenizer; that it has no token for a text is no mistake of the file."""
    for text in _TRIALS:
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode(text).ids)
            tokenizer.decode([0, 1, 2], skip_special_tokens=False)


def _explain(error: BaseException, what: str, *, fix: str = "take the model's own tokenizer.") -> BaseException:
    """What to raise for an error of the library, which has no class of its own; its panics are no `Exception`."""
    is_ours = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    why = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
    return DataError(f"{what}: {why}.", fix=fix) if is_ours else error


def keep_tokenizer(path: str, folder: Path) -> None:
    """Copy the tokenizer of a run into its folder, so that whoever serves or exports the run finds it; bytes need none.

    Raises:
        DataError: there is none, or it is broken.
    """
    if path != "bytes":
        file = load_tokenizer(path).file
        copy_tokenizer(file.parent, folder, besides=(TOKENIZER,))
        real = file.resolve()
        copy_file(real.parent, real.name, folder / TOKENIZER, error=DataError)


def copy_tokenizer(source: Path, target: Path, *, besides: Sequence[str] = ()) -> None:
    """Copy what belongs to a tokenizer from one folder to another, in place of what is there.

    Args:
        besides: names that are left out.

    Raises:
        DataError: a file is none that a folder from others may hold.
    """
    for name in TOKENIZER_FILES:
        if name not in besides:
            copy_file(source, name, target / name, error=DataError)
    if not (target / ORIGIN).exists():
        copy_file(source, ORIGIN, target / ORIGIN, error=DataError)


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the config.json that a run folder's model came with; empty where it came from none.

    Raises:
        DataError: it is broken.
    """
    values = read_json(folder, ORIGIN, error=DataError)
    return values if isinstance(values, dict) else {}


def tokenize(
    documents: Sequence[tuple[str, bytes]],
    tokenizer: ModelTokenizer,
    *,
    cache: Path | None,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Return the ids of documents (name, UTF-8 text) one after another, each with its end where there is one.

    They begin as prompts do. uint16 where the vocabulary allows, else uint32. With a folder as `cache` they are kept
    there, under a hash of text, tokenizer and what stands around a text, and mapped from there the next time.

    Args:
        vocab_size: that of the model, if known.

    Raises:
        DataError: a document is no UTF-8, or has a token whose id is not below `vocab_size`.
    """
    if cache is None:
        return _encode(documents, tokenizer, vocab_size)
    file = cache / TOKENS_FOLDER / f"{_hash(documents, tokenizer)}.npy"
    kept = _open_tokens(file)
    if kept is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # All processes of a run come by here at once, and in containers they have one id.
        part = free_name(file.with_suffix(f".part-{socket.gethostname()}-{os.getpid()}"))
        with open_own(part, "xb") as stream:
            np.save(stream, _encode(documents, tokenizer, vocab_size))
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
    digest.update(f"{tokenizer.encode_prompt('')} {tokenizer.special.end_id}".encode())
    for _, text in documents:
        # The length too: the same bytes cut into other documents are other tokens.
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
