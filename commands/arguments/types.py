"""Define argument types for argparse: valid paths, and numbers in ASCII digits of at most 64 bits."""

import argparse

from ...configs.values import find_text_problem
from ...meshes.errors import shown
from ...meshes.numbers import real_number, whole_number


def parse_whole(text: str) -> int:
    """Parse a whole number.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {shown(text)}") from None


def parse_path(text: str) -> str:
    """Check that a text can be a path, and return it.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    problem = find_text_problem(text) if text.strip() else f"expected a path, got {text!r}"
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return text


def parse_real(text: str) -> float:
    """Parse a real number, infinity and NaN included.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    try:
        return real_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {shown(text)}") from None


def parse_bias(text: str) -> tuple[int, float]:
    """Parse a token and what is added to its logit, as 42=-1.5.

    Raises:
        argparse.ArgumentTypeError: the text is not such a pair.
    """
    token, _, bias = text.partition("=")
    try:
        return whole_number(token), real_number(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a token id and a bias, 42=-1.5 say, got {shown(text)}") from None
