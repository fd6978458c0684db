"""What words of the command line may be, for argparse: possible paths, and numbers in ASCII digits within 64 bits."""

import argparse

from ..configs.values import find_text_problem
from ..meshes.errors import shown
from ..meshes.numbers import real_number, whole_number


def whole(text: str) -> int:
    """Return the whole number that a word is.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {shown(text)}") from None


def path(text: str) -> str:
    """Return the path that a word is.

    Raises:
        argparse.ArgumentTypeError: no file system has a path like it.
    """
    problem = find_text_problem(text) if text.strip() else f"expected a path, got {text!r}"
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return text


def number(text: str) -> float:
    """Return the number that a word is; whether it may be infinite is the command's to say.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return real_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {shown(text)}") from None
