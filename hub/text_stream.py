"""Convert text to token ids and back, for whole texts and for a stream of tokens."""

from collections.abc import Sequence
from typing import Protocol

from ..meshes import TrellaxError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Number of prompt tokens that are decoded along with the answer: more than a character has bytes."""

_WINDOW = 64
"""Number of tokens that are decoded together before those in front of the last `_CONTEXT` are left out."""

_CHARACTER = 4
"""Maximum number of bytes of a character in UTF-8."""


class Tokenizer(Protocol):
    """Converts text to the token ids of a model and back."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text to continue, with the special tokens that begin a text."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become replacement characters."""
        ...


class ByteTokenizer:
    """The tokenizer whose tokens are the bytes of a text, for models trained with data.tokenizer="bytes".

    >>> ByteTokenizer().encode("hi")
    [104, 105]
    """

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text in UTF-8."""
        return list(text.encode("utf-8"))

    encode_prompt = encode

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes; ids of 256 and above are left out."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class TextStream:
    """Decode a stream of tokens; a character is returned once all its bytes have arrived.

    A token costs the decoding of at most `_WINDOW` tokens before it, however long the stream is, unless more than these
    in a row are no text.

    >>> stream = TextStream(ByteTokenizer())
    >>> [stream.add(byte) for byte in "aé".encode()]
    ['a', '', 'é']

    Args:
        prompt: the tokens before the stream; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Some decoders drop a space at the start of a text, so the answer is decoded after the end of the prompt.
        self._tokens = list(prompt[-_CONTEXT:])
        self._num_shown = self._pass_over_prompt(is_cut=len(prompt) > _CONTEXT)

    def add(self, *tokens: int) -> str:
        """Add tokens, and return the text that they complete."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        # Decoders return a replacement character for an incomplete character, or one for each of its bytes.
        shown = self._show(text.rstrip(_UNFINISHED))
        if len(self._tokens) > _WINDOW and not text.endswith(_UNFINISHED):
            self._leave_out()
        return shown

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _leave_out(self) -> None:
        """Keep the last tokens of the stream, all of whose text has been returned, as if they were the prompt."""
        # Tokens without text are no context: a decoder would drop the space after them.
        if self._tokenizer.decode(self._tokens[-_CONTEXT:]):
            del self._tokens[:-_CONTEXT]
            self._num_shown = self._pass_over_prompt(is_cut=True)

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
