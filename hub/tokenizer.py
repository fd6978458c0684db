"""Load a tokenizer.json with the `tokenizers` library, and encode and decode text.

Read `tokenized_text.py` for whole documents, and `text_stream.py` for text that is decoded while tokens still come.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ..meshes import DataError
from .cached_folder import find_model_folder
from .folder import MAX_TOKENIZER_BYTES, read_file
from .special_ids import SpecialIds, find_special_ids

TOKENIZER = "tokenizer.json"
"""Name of the tokenizer file in a model folder."""

_TRIALS = ("", "a", "Hello, world! 12 \n\té")
"""Texts that a new tokenizer is tested with."""


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """The tokenizer of a model, with its special ids.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        file: path of its tokenizer.json.
        vocab_size: largest id + 1. The vocabulary of the model may be smaller by a few unused ids.
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

    def encode_places(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of texts, as `encode` does, and the span [start, end) of letters of each token.

        Raises:
            DataError: the tokenizer has no token for a part of a text.
        """
        return [(encoding.ids, encoding.offsets) for encoding in self._encode(texts, special="without")]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer puts before it.

        Raises:
            DataError: the tokenizer has no token for a part of it.
        """
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, each as `encode_prompt` returns it.

        Raises:
            DataError: the tokenizer has no token for a part of a text.
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
        """Number of special tokens before a text; for an empty text the mask does not tell them from those after it."""
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
            DataError: the tokenizer cannot decode them.
        """
        try:
            with _quiet_panics():
                return self.tokenizer.decode(list(ids), skip_special_tokens=True)
        except BaseException as error:
            raise _explain(error, f"{self.file} cannot write this text") from None


def load_tokenizer(path: str | Path) -> ModelTokenizer:
    """Load a tokenizer.json, given by its path, by a folder that holds one, or by the name of a downloaded model.

    Raises:
        DataError: there is no such file, or it is broken.
    """
    path = find_model_folder(path)
    file = path / TOKENIZER if path.is_dir() else path
    content = _read_tokenizer(file, is_named=not path.is_dir())
    if content is None:
        raise DataError(
            f"{file} is no tokenizer: there is no such file.",
            fix="name a tokenizer.json or the folder of a model that has one.",
        )
    try:
        with _quiet_panics():
            tokenizer = Tokenizer.from_buffer(content)
            # Before the test, since a file may ask for padding of any length.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            _try_out(tokenizer)
    except BaseException as error:
        raise _explain(error, f"{file} is no tokenizer", fix=f"name a {TOKENIZER}.") from None
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = find_special_ids(file.parent, tokenizer)
    return ModelTokenizer(tokenizer=tokenizer, file=file, vocab_size=size, special=special)


def _read_tokenizer(file: Path, *, is_named: bool) -> bytes | None:
    """Read a tokenizer.json; a path given by the user may be a link to anywhere, one in a folder only into it."""
    real = file.resolve() if is_named else file
    return read_file(real.parent, real.name, max_bytes=MAX_TOKENIZER_BYTES, error=DataError)


_redirecting = threading.Lock()


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Redirect stderr while the library runs, since its panics print stack traces there.

    Keep it short: stderr is that of the process, so other threads are silenced too. One at a time: a second thread
    would keep the first one's redirected stderr, and restore it for good.
    """
    with _redirecting:
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
    """Raise if a tokenizer panics on a text; an exception, such as for a text without a token, is not a broken file."""
    for text in _TRIALS:
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode(text).ids)
            tokenizer.decode([0, 1, 2], skip_special_tokens=False)


def _explain(error: BaseException, what: str, *, fix: str = "take the model's own tokenizer.") -> BaseException:
    """Return a `DataError` for an error of the library, and any other error unchanged.

    The library raises plain `Exception`, and its panics are a subclass of `BaseException` only.
    """
    is_ours = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    why = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
    return DataError(f"{what}: {why}.", fix=fix) if is_ours else error
