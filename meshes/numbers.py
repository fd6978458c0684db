"""Numbers as people type them: what Python's own `int` and `float` take, in ASCII and of a bounded size.

`int` reads the digits of every script, and refuses thousands of them with an error of its own.
"""

_LARGEST = 2**63
_LONGEST = 100


def whole_number(text: str) -> int:
    """Return the whole number that a word is.

    >>> whole_number("1_000")
    1000

    Raises:
        ValueError: it is none, or needs more than 64 bits.
    """
    if len(text) > _LONGEST:
        raise ValueError("expected a whole number of at most 64 bits")
    try:
        number = int(_ascii(text))
    except ValueError:
        raise ValueError("expected a whole number") from None
    if not -_LARGEST <= number < _LARGEST:
        raise ValueError("expected a whole number of at most 64 bits")
    return number


def real_number(text: str) -> float:
    """Return the number that a word is.

    >>> real_number("1e-3")
    0.001

    Raises:
        ValueError: it is none.
    """
    try:
        return float(_ascii(text))
    except ValueError:
        raise ValueError("expected a number") from None


def _ascii(text: str) -> str:
    if not text.isascii():
        raise ValueError("digits are 0 to 9")
    return text
