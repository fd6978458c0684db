"""Find stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Pass a text on up to the first stop string, which may begin in one piece and end in a later one.

    >>> stops = StopStrings(["END"])
    >>> [stops.add(piece) for piece in ("ab E", "N", "D cd")], stops.has_stopped
    (['ab ', '', ''], True)

    Args:
        stops: strings that end the text and are not part of it, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False

    def add(self, piece: str) -> str:
        """Return the text that is certain to come before any stop string; nothing after one was found."""
        if self.has_stopped:
            return ""
        text = self._held + piece
        # Of several the one that begins first, and of those any.
        begins = [begin for stop in self._stops if (begin := text.find(stop)) >= 0]
        if begins:
            self.has_stopped = True
            return text[: min(begins)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the text that was held back, at the end."""
        return "" if self.has_stopped else self._held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
