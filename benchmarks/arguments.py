"""Parse the command line of a benchmark: the flags that all of them have, and counts."""

import argparse

from trellax.commands.arguments.types import parse_real, parse_whole


def make_parser(doc: str | None, *, quick: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with `--json` and, where a shorter run exists, `--quick`.

    Args:
        doc: docstring of the benchmark, whose first line describes it in the help.
        quick: what the shorter run measures.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse_count(text: str) -> int:
    """Parse a whole number of 1 or more.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    count = parse_whole(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return count


def parse_minutes(text: str) -> float:
    """Parse a finite number of minutes above 0.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    minutes = parse_real(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return minutes
