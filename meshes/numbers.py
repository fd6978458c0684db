"""Parse numbers as people type them: what Python's `int` and `float` take, in ASCII digits and of bounded size.

`int` itself takes the digits of every script, and refuses thousands of digits with an error of its own.
"""

_LIMIT = 2**63
_MAX_CHARACTERS = 100


def whole_number(text: str) -> int:
    """Parse a whole number of at most 64 bits.

    >>> whole_number("1_000")
    1000

    Raises:
        ValueError: the text is not one.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError("expected a whole number of at most 64 bits")
    try:
        number = int(_check_ascii(text))
    except ValueError:
        raise ValueError("expected a whole number") from None
    if not -_LIMIT <= number < _LIMIT:
        raise ValueError("expected a whole number of at most 64 bits")
    return number


def real_number(text: str) -> float:
    """Parse a real number, `inf` and `nan` included.

    >>> real_number("1e-3")
    0.001

    Raises:
        ValueError: the text is not one.
    """
    try:
        return float(_check_ascii(text))
    except ValueError:
        raise ValueError("expected a number") from None


def _check_ascii(text: str) -> str:
    if not text.isascii():
        raise ValueError("digits are 0 to 9")
    return text
