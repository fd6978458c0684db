"""Declare `--weights`, the choice between the weights of a run and their average."""

import argparse


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="weights of a run: those of its last step, or their average, train.ema (default last)",
    )
