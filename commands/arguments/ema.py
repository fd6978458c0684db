"""Declare `--ema`, the choice of the average of a run's weights."""

import argparse
from typing import Literal


def add_ema_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument(
        "--ema", action="store_true", help="take the average of a run's weights, train.ema, not those of its last step"
    )


def chosen_weights(args: argparse.Namespace) -> Literal["last", "ema"]:
    """Return which weights of a run are asked for."""
    return "ema" if args.ema else "last"
