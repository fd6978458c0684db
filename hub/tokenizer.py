"""Read a model's tokenizer.json, with the library that wrote it, and encode and decode text.

Read `tokenized_text.py` for whole documents, and `text_stream.py` for text that is decoded while tokens still come.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ..meshes import DataError
from .folder import MAX_TOKENIZER_BYTES, read_file
from .special_ids import SpecialIds, find_special_ids

TOKENIZER = "tokenizer.json"
"""The name of a tokenizer's file in the folder of a model."""

_TRIALS = ("", "a", "Hello, world! 12 \n\té")
"""Texts that a tokenizer is tried with."""


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer, and the ids that begin and end texts of its model.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        file: its tokenizer.json.
        vocab_size: one more than its largest id. Its model may have a few ids less.
        special: ids that begin and end texts.
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
        """Return the ids of a text, with the special tokens that the tokenizer puts before it.

        Raises:
            DataError: the tokenizer has no token for a part of it.
        """
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, each as `encode_prompt` returns it.

        Raises:
            DataError: the tokenizer has no token for a part of one.
        """
        found = []
        for encoding in self._encode(texts, special="with"):
            ids, mask = encoding.ids, encoding.special_tokens_mask
            # Special tokens after the text would tell the model that the text ends there.
            num_before = mask.index(0) if 0 in mask else self._num_before
            while len(ids) > num_before and mask[len(ids) - 1]:
                ids.pop()
            found.append(ids)
        return found

    @cached_property
    def _num_before(self) -> int:
        """Number of special tokens before a text: around an empty text they cannot be told from those after it."""
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
    """Read a tokenizer.json; a file that a user names may be a link to anywhere, one in a folder only into it."""
    real = file.resolve() if is_named else file
    return read_file(real.parent, real.name, max_bytes=MAX_TOKENIZER_BYTES, error=DataError)


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keep the library's panics off stderr, where it prints stacks. Briefly: other threads are silenced as well."""
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
    """Raise the panics of a broken tokenizer; that it has no token for a text is no mistake of its file."""
    for text in _TRIALS:
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode(text).ids)
            tokenizer.decode([0, 1, 2], skip_special_tokens=False)


def _explain(error: BaseException, what: str, *, fix: str = "take the model's own tokenizer.") -> BaseException:
    """Return the `DataError` for an error of the library, and any other error as it is.

    The library has no class of its own for errors, and its panics are no `Exception`.
    """
    is_ours = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    why = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
    return DataError(f"{what}: {why}.", fix=fix) if is_ours else error
