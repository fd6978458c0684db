"""Declare the arguments of the serving engine, which `generate` and `bench-decode` share."""

import argparse

from .types import parse_path, parse_whole


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --fake-devices, --dtype, --weights, --cache-dtype, --chunk, --groups and --json."""
    parser.add_argument("--fake-devices", type=parse_whole, default=0, metavar="N", help="run on N fake CPU devices")
    parser.add_argument("--dtype", metavar="T", help="dtype to compute in, float32 or bfloat16 (default: the model's)")
    parser.add_argument(
        "--weights",
        metavar="T",
        default="plain",
        help="weights of linear layers in eight bits, int8 or fp8, rounded as they are loaded (default: plain)",
    )
    parser.add_argument(
        "--cache-dtype",
        metavar="T",
        help="dtype of cached keys and values, float32, bfloat16 or fp8 (default: the model's)",
    )
    parser.add_argument(
        "--chunk", type=parse_whole, default=64, metavar="N", help="prompt tokens prefilled at once (default 64)"
    )
    parser.add_argument(
        "--groups", type=parse_whole, default=0, metavar="N", help="request groups in flight (default: one a stage)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_speculate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --speculate and --speculate-tokens."""
    parser.add_argument(
        "--speculate",
        type=parse_path,
        metavar="HOW",
        help="guess tokens and check several at once: lookup, or the folder of a smaller model (default: none)",
    )
    parser.add_argument(
        "--speculate-tokens", type=parse_whole, default=4, metavar="N", help="tokens guessed at a time (default 4)"
    )
