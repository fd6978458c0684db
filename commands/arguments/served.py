"""Declare the arguments by which `describe` and `inspect` report on an engine that serves the model of a config."""

import argparse

from ...meshes.errors import ServeError
from .types import parse_whole

_OPTIONS = ("weights", "cache_dtype", "slots", "max_tokens", "chunk", "context")


def add_served_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --serve, and the sizes and formats of the engine."""
    parser.add_argument("--serve", action="store_true", help="report on serving the model, not on training it")
    parser.add_argument(
        "--weights", metavar="T", help="with --serve: weights of linear layers, plain, int8 or fp8 (default: plain)"
    )
    parser.add_argument(
        "--cache-dtype",
        metavar="T",
        help="with --serve: cached keys and values, float32, bfloat16 or fp8 (default: the model's dtype)",
    )
    parser.add_argument(
        "--slots",
        type=parse_whole,
        default=0,
        metavar="N",
        help="with --serve: answers decoded at a time (default: one a stage and data shard)",
    )
    parser.add_argument(
        "--max-tokens",
        type=parse_whole,
        default=0,
        metavar="N",
        help="with --serve: cached tokens of an answer, with its prompt (default: what the model reads)",
    )
    parser.add_argument(
        "--chunk",
        type=parse_whole,
        default=0,
        metavar="N",
        help="with --serve: prompt tokens read at once (default: 64)",
    )


def check_served_arguments(args: argparse.Namespace) -> None:
    """Check that options of serving stand beside --serve.

    Raises:
        ServeError: one of them does not.
    """
    given = [name for name in _OPTIONS if getattr(args, name, None)]
    if given and not args.serve:
        option = f"--{given[0].replace('_', '-')}"
        raise ServeError(f"{option} is of a server, and this reports on training.", fix=f"write --serve {option} ...")
