"""Declare the arguments of `trellax train`."""

import argparse

from .config import add_config_arguments
from .processes import add_process_arguments
from .types import parse_whole


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="start from step 0; refused if the run has a save")
    parser.add_argument("--force", action="store_true", help="with --fresh: move the old saves to a folder beside them")
    parser.add_argument("--override", action="store_true", help="resume although the config changes the result")
    parser.add_argument(
        "--profile", metavar="N", type=_parse_num_steps, default=0, help="trace N steps after the first ones"
    )
    add_process_arguments(parser)


def _parse_num_steps(text: str) -> int:
    if not 0 < (steps := parse_whole(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return steps
