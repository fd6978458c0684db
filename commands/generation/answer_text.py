"""Decode the tokens of answers, end them at stop strings, and print them as they arrive.

A stop of one token is also a stop token of the request, which ends the answer on the devices. One of several is found
in the text, which may be decoded a token late, and the sequence is cancelled after the step.
"""

import re
from collections.abc import Sequence
from typing import TextIO, TypeVar

from ...hub.text_stream import TextStream, Tokenizer
from ...serve import Engine, Request, ServedSequence
from ...serve.stop_strings import StopStrings

_OfToken = TypeVar("_OfToken")

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters (C0, DEL and C1) except line ends and tabs."""


def is_text(word: str) -> bool:
    """Return whether a word of the command line or of stdin is UTF-8: Python decodes other bytes to surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def read_stops(words: Sequence[str]) -> list[str]:
    r"""Return stop strings of the command line, where `\n` stands for a line end, which most shells write badly."""
    return [word.replace("\\n", "\n") for word in words if word]


def stop_tokens(stops: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the stop strings that are one: special tokens among them have no text."""
    encoded = [tokenizer.encode(stop) for stop in stops]
    return [tokens[0] for tokens in encoded if len(tokens) == 1]


class AnswerText:
    """The text of one answer, up to its first stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = TextStream(tokenizer, prompt=request.prompt), StopStrings(stops)
        self.text, self._num_tokens = "", 0

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.has_stopped

    def add(self, token: int) -> str:
        """Add a token, and return the text that is certain to be a part of the answer."""
        self._num_tokens += 0 if self.has_stopped else 1
        return self._keep(self._stops.add(self._stream.add(token)))

    def kept(self, of_tokens: Sequence[_OfToken]) -> Sequence[_OfToken]:
        """Return what there is for each token, up to the end of a stop string: an engine is some tokens ahead."""
        return of_tokens[: self._num_tokens] if self.has_stopped else of_tokens

    def finish(self) -> str:
        """Return the rest of the text, at the end."""
        return self._keep(self._stops.add(self._stream.finish()) + self._stops.finish())

    def finish_reason(self, sequence: ServedSequence) -> str | None:
        """Return why the answer has ended: at a stop string its sequence was cancelled."""
        return "stop" if self.has_stopped else sequence.finish_reason

    def _keep(self, piece: str) -> str:
        self.text += piece
        return piece


def write_text(out: TextIO, text: str) -> None:
    """Write text of a model to a stream at once.

    A terminal would obey control characters that a model writes; files and programs get them unchanged. A stream that
    is not UTF-8 cannot encode all characters that a model writes.
    """
    text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text) if out.isatty() else text
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "backslashreplace").decode(encoding))
    out.flush()


def cancel_stopped(engine: Engine, sequences: Sequence[ServedSequence], answers: Sequence[AnswerText]) -> None:
    """Cancel the sequences whose answers have come to a stop string, between two steps."""
    for sequence, answer in zip(sequences, answers, strict=True):
        if answer.has_stopped:
            engine.cancel(sequence)
