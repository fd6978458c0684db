"""Declare the arguments of `trellax data`."""

import argparse

from ...meshes.errors import DataError, suggest
from .types import parse_path, parse_real, parse_whole

_ACTIONS = ("prepare", "train-tokenizer")
_DEFAULTS = {"chat": False, "tokenizer": "bytes", "processes": 0, "shard_mib": 64, "max_damaged": 1e-3}
"""Options of `prepare` alone."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both actions."""
    parser.add_argument(
        "action",
        metavar="ACTION",
        help="prepare: tokenize files once into memory-mapped shards; train-tokenizer: train a byte-level BPE on files",
    )
    parser.add_argument(
        "source",
        type=parse_path,
        nargs="+",
        metavar="SOURCE",
        help=".jsonl (.gz, .zst), .parquet, .arrow or text files, globs, or a folder that datasets saved",
    )
    parser.add_argument(
        "--out",
        type=parse_path,
        required=True,
        metavar="DIR",
        help="folder to write; a stopped `prepare` goes on in it, and a tokenizer needs a new one",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="field of a record that holds its text (default text; messages of chats)"
    )
    _add_prepare_arguments(parser)
    parser.add_argument("--vocab-size", type=parse_whole, metavar="N", help="train-tokenizer: number of token ids")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat",
        action="store_const",
        const=True,
        help="prepare: records are chats, of which the answers alone are trained on; the tokenizer's folder has the "
        "chat template",
    )
    parser.add_argument(
        "--tokenizer", type=parse_path, metavar="T", help="prepare: a tokenizer.json or a folder (default: bytes)"
    )
    parser.add_argument(
        "--processes", type=parse_whole, metavar="N", help="prepare: processes that tokenize (default: one a core)"
    )
    parser.add_argument("--shard-mib", type=parse_whole, metavar="N", help="prepare: MiB of text a shard (default 64)")
    parser.add_argument(
        "--max-damaged", type=parse_real, metavar="X", help="prepare: largest share of damaged records (default 0.001)"
    )


def check_data_arguments(args: argparse.Namespace) -> None:
    """Check the arguments against the action, and set the defaults of those that are not given.

    Raises:
        DataError: one is out of its range, or of the other action.
    """
    if args.action not in _ACTIONS:
        raise DataError(
            f"unknown action {args.action!r}; there are {' and '.join(_ACTIONS)}.{suggest(args.action, _ACTIONS)}",
            fix="write `trellax data prepare SOURCE --out DIR`.",
        )
    if args.action == "train-tokenizer":
        given = next((name for name in _DEFAULTS if getattr(args, name) is not None), None)
        if given:
            raise DataError(f"--{given.replace('_', '-')} is for `trellax data prepare`.", fix="leave it out.")
        if args.vocab_size is None:
            raise DataError("`trellax data train-tokenizer` needs --vocab-size.", fix="write --vocab-size 32768, say.")
        return
    if args.vocab_size is not None:
        raise DataError("--vocab-size is for `trellax data train-tokenizer`.", fix="leave it out.")
    for name, default in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for option, value, (least, most) in (
        ("--processes", args.processes, (0, 1024)),
        ("--shard-mib", args.shard_mib, (1, 1 << 20)),
        ("--max-damaged", args.max_damaged, (0, 1)),
    ):
        if not least <= value <= most:
            raise DataError(f"{option} {value} is out of range.", fix=f"give a number from {least:,} to {most:,}.")
