"""Declare the arguments of `trellax bench-decode`."""

import argparse

from .engine import add_engine_arguments
from .types import parse_path, parse_whole


def add_bench_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model",
        type=parse_path,
        metavar="CONFIG_OR_FOLDER",
        help="a config, whose model gets random weights, or a folder with a model",
    )
    parser.add_argument("--batch", default="1,4,16", metavar="N,N", help="requests at a time (default 1,4,16)")
    parser.add_argument(
        "--meshes", default="data=1", metavar="M;M", help="for example 'tensor=4;pipe=4' (default: one device)"
    )
    parser.add_argument(
        "--prompt-tokens", type=parse_whole, default=32, metavar="N", help="tokens of a prompt (default 32)"
    )
    parser.add_argument(
        "--new-tokens", type=parse_whole, default=32, metavar="N", help="tokens of an answer, 2 or more (default 32)"
    )
    parser.add_argument("--png", metavar="FILE", help="plot throughput against latency")
    add_engine_arguments(parser)
