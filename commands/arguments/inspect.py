"""Declare the arguments of `trellax inspect`."""

import argparse

from .config import add_config_arguments
from .served import add_served_arguments
from .types import parse_whole


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--target",
        metavar="NAME[:N[/M]]",
        default="cpu",
        help="compile for cpu (default) or for GPUs that need not exist: h200:8, a100-80:16, h100:64/8 for 8 a node",
    )
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program (HLO) as text")
    parser.add_argument("--png", metavar="FILE", help="draw memory beside the device's, and traffic beside the minimum")
    add_served_arguments(parser)
    parser.add_argument(
        "--context", type=parse_whole, default=0, metavar="N", help="with --serve: cached tokens (default: 1024)"
    )
