"""`trellax data prepare` and `trellax data train-tokenizer`: make shards of tokens, or a tokenizer, of a corpus."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ...meshes import DataError
from ...meshes.files.new_folder import new_folder
from ...train.data.records.damage import Damage
from ...train.data.shards.prepare_tokens import prepare_tokens
from ...train.data.shards.train_tokenizer import train_tokenizer
from .find_named import find_named

_NUM_LINES = 20


def run_data(args: argparse.Namespace) -> int:
    """Run the action that is named, and return the exit code.

    Raises:
        TrellaxError: a file cannot be read, or the folder cannot be written.
    """
    try:
        numbers = _prepare(args) if args.action == "prepare" else _train_tokenizer(args)
    except OSError as error:
        raise DataError(
            f"{error.filename or args.out} cannot be used: {error.strerror or error}.",
            fix="make room, or let it be written, then give the same command again.",
        ) from None
    if args.json:
        print(json.dumps(numbers))
    return 0


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    files, start_s = find_named(args.source, option="SOURCE"), time.perf_counter()
    with _Bar() as bar, _told_of_stops():
        index = prepare_tokens(
            files,
            out=Path(args.out),
            tokenizer=args.tokenizer,
            field=args.text_field or ("messages" if args.chat else "text"),
            holds="messages" if args.chat else "text",
            shard_bytes=args.shard_mib << 20,
            num_processes=args.processes or os.cpu_count() or 1,
            max_damaged=args.max_damaged,
            report=bar.show,
        )
    seconds, num_shards = time.perf_counter() - start_s, len(index["shards"])
    if not args.json:
        rate = f", {bar.new_bytes / seconds / 1e6:,.1f} MB/s" if bar.new_bytes else ""
        print(f"{index['num_tokens']:,} tokens of {index['num_documents']:,} documents in {seconds:.1f} s{rate}")
        if index["num_damaged"]:
            print(f"{index['num_damaged']:,} damaged records left out: {'; '.join(index['damaged'])}")
        print(f"{args.out}: {num_shards} shards, sha256 {index['sha256'][:12]}")
        print(f"trellax train CONFIG --data.source tokens --data.paths {args.out}")
    numbers = ("num_tokens", "num_documents", "text_bytes", "num_damaged", "vocab_size_needed", "sha256")
    found = {name: index[name] for name in (*numbers, "damaged")}
    return {"folder": args.out, "shards": num_shards, "seconds": seconds} | found


def _train_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    files, start_s, damage = find_named(args.source, option="SOURCE"), time.perf_counter(), Damage()
    with new_folder(args.out) as part:
        size = train_tokenizer(
            files, out=part, vocab_size=args.vocab_size, field=args.text_field or "text", damage=damage
        )
    seconds = time.perf_counter() - start_s
    if not args.json:
        print(f"{size:,} tokens in {seconds:.1f} s\n{args.out}: tokenizer.json, tokenizer_config.json")
    return {"folder": args.out, "vocab_size": size, "seconds": seconds}


@contextmanager
def _told_of_stops() -> Iterator[None]:
    """Say on stderr what becomes of the shards, if the user stops the command."""
    try:
        yield
    except KeyboardInterrupt:
        print("the shards that are written stay; the same command goes on", file=sys.stderr)
        raise


class _Bar:
    """Show how many bytes are done: a live bar on a terminal, about twenty lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(
            TextColumn("tokenizing"), *columns, console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._progress.add_task("tokenizing", total=None)
        self._first: int | None = None
        self._lines = 0
        self.new_bytes = 0
        """Bytes that this call has done, not one before it."""

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        self._first = done if self._first is None else self._first
        self.new_bytes = done - self._first
        self._progress.update(self._task, completed=done, total=total)
        lines = done * _NUM_LINES // max(1, total)
        if not self._console.is_terminal and lines > self._lines:
            self._lines = lines
            print(f"{_megabytes(done)} of {_megabytes(total)} MB", file=sys.stderr)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10**7 else f"{count / 1e6:.2g}"
