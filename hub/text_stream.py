"""Convert text to token ids and back, also while tokens still come."""

from collections.abc import Sequence
from typing import Protocol

from ..meshes import TrellaxError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Number of a prompt's tokens that are decoded along with the answer: more than the bytes of a character."""

_CHARACTER = 4
"""The most bytes of a character in UTF-8."""


class Tokenizer(Protocol):
    """Converts text to the token ids of a model and back."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text that a model is to continue, begun as its texts begin."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids; bytes that are no text become replacement characters."""
        ...


class ByteTokenizer:
    """Bytes as tokens: the tokenizer of models trained on text files as they are.

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
    """Decodes a sequence piece by piece, as its tokens come; shows a character once all its bytes are there.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.add(byte) for byte in "aé".encode()]
    ['a', '', 'é']

    Args:
        prompt: the tokens before; their text is not shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop the space before the first word, so the answer must not begin what is decoded.
        self._tokens = list(prompt[-_CONTEXT:])
        self._num_shown = self._pass_over_prompt(is_cut=len(prompt) > _CONTEXT)

    def add(self, *tokens: int) -> str:
        """Return the text that can be shown now that these tokens have come."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        # Decoders show a replacement character for a part of a character, or one for each of its bytes.
        return self._show(text.rstrip(_UNFINISHED))

    def finish(self) -> str:
        """Return the rest of the text once no more tokens come."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _pass_over_prompt(self, *, is_cut: bool) -> int:
        """Return the number of letters of the prompt, without a part of a character at its end.

        The answer may complete that part. Where the cut has left the end of a character at the start, its tokens are
        dropped. Both ends are tried together, since some decoders replace a whole run of bytes where one is missing.
        """
        sign = self._sign()
        for first in range(_CHARACTER if is_cut else 1):
            for num_parts in range(_CHARACTER):
                tokens = self._tokens[first : max(first, len(self._tokens) - num_parts)]
                text = self._tokenizer.decode(tokens)
                # The replacement character may be what was written.
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
