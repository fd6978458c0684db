"""Declare the arguments of `trellax describe`."""

import argparse

from .config import add_config_arguments
from .served import add_served_arguments


def add_describe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_config_arguments(parser)
    add_served_arguments(parser)
