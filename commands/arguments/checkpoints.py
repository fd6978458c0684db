"""Declare the arguments of `trellax checkpoints`."""

import argparse

from .types import parse_path


def add_checkpoints_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", type=parse_path, metavar="DIR", help="a run folder, or the checkpoints folder in it")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its hash with the seal's")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
