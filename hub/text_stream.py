"""Text to token ids and back, and text as it appears while tokens still come."""

from collections.abc import Sequence
from typing import Protocol

from ..meshes import TrellaxError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Tokens of a prompt that are decoded along with the answer: more than the bytes of a character."""

_CHARACTER = 4
"""Bytes of a character in UTF-8, at most."""


class Tokenizer(Protocol):
    """What turns text into the token ids of a model and back."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text that a model is to go on from, begun as its texts begin."""
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

    encode_prompt = encode

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes; ids of 256 and more, which no text has, are left out."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class TextStream:
    """The text of a sequence, in pieces, as its tokens come; a character is shown once all its bytes are there.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.add(byte) for byte in "aé".encode()]
    ['a', '', 'é']

    Args:
        prompt: what the tokens go on from; its text is not shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop the space before the first word: the answer's must not be the first.
        self._tokens = list(prompt[-_CONTEXT:])
        self._num_shown = self._pass_over_prompt(is_cut=len(prompt) > _CONTEXT)

    def add(self, *tokens: int) -> str:
        """Return what can be shown now that tokens have come."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        # For the bytes of a character that is not whole decoders show one sign, or one for each.
        return self._show(text.rstrip(_UNFINISHED))

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _pass_over_prompt(self, *, is_cut: bool) -> int:
        """Return the number of letters of the prompt, without a part of a character at its end, which may be completed.

        Where a cut has left the rest of a character at its start, those tokens are dropped. Both ends are tried
        together, since some decoders turn a whole row of bytes into signs where one is missing.
        """
        sign = self._sign()
        for first in range(_CHARACTER if is_cut else 1):
            for num_parts in range(_CHARACTER):
                tokens = self._tokens[first : max(first, len(self._tokens) - num_parts)]
                text = self._tokenizer.decode(tokens)
                # The sign may be what was written.
                is_whole = not text.endswith(_UNFINISHED) or tokens[-len(sign) :] == sign
                if is_whole and not (is_cut and text.startswith(_UNFINISHED)):
                    del self._tokens[:first]
                    return len(text)
        return len(self._tokenizer.decode(self._tokens))

    def _sign(self) -> list[int]:
        try:
            return self._tokenizer.encode(_UNFINISHED)
        except TrellaxError:  # the tokenizer has no token for it
            return []

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new
