"""Text to token ids and back, and text as it appears while tokens still come."""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What turns text into the token ids of a model and back."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids; what is no text becomes a replacement character."""
        ...


class ByteTokenizer:
    """Bytes as tokens: what models have that were trained on text files as they are.

    >>> ByteTokenizer().encode("hi")
    [104, 105]
    """

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text in UTF-8."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes; ids of 256 and more, which no text has, are left out."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class TextStream:
    """The text of a sequence, in pieces, as its tokens come; a character is shown once all its bytes are there.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.add(byte) for byte in "aé".encode()]
    ['a', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Return what can be shown now that a token has come."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # However many bytes of a character are there, decoders show one sign for them, the last.
        return self._show(text.removesuffix(_UNFINISHED))

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new
