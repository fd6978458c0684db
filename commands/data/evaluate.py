"""`trellax eval`: print loss, perplexity and bits per byte of a model on files, or its scores in tasks."""

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

from ...meshes import use_fake_devices
from ...meshes.columns import align
from ...train.perplexity.evaluate_files import FileLoss, evaluate_files, sum_losses
from ..arguments.ema import chosen_weights
from ..engine import resolve_mesh
from .find_named import find_named

_TASK_HEAD = ("task", "metric", "filter", "score", "stderr")
_HEAD = ("file", "documents", "tokens", "loss", "perplexity", "bits/byte")


def run_eval(args: argparse.Namespace) -> int:
    """Print a table, or JSON, and return the exit code.

    Raises:
        TrellaxError: model, files or mesh do not fit.
    """
    files = find_named(args.data, option="--data") if args.data else []
    # First, since fake devices must be chosen before jax starts.
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
    if args.tasks:
        return _run_tasks(args)
    losses = evaluate_files(
        args.folder,
        files,
        mesh=resolve_mesh(args.mesh),
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        field=args.text_field,
        dtype=args.dtype,
        weights=chosen_weights(args),
    )
    total = sum_losses(losses, name="all files")
    if args.json:
        print(json.dumps({"files": [_numbers(own) for own in losses], "all": _numbers(total)}))
        return 0
    rows = [_row(own) for own in ([*losses, total] if len(losses) > 1 else losses)]
    print(align([_HEAD, *rows]))
    return 0


def _run_tasks(args: argparse.Namespace) -> int:
    from ..harness.run_tasks import run_tasks

    results = run_tasks(
        args.folder,
        args.tasks,
        mesh=resolve_mesh(args.mesh),
        batch_size=args.batch_size,
        max_length=args.seq_len,
        dtype=args.dtype,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    if args.json:
        print(json.dumps(results, default=str))
        return 0
    rows = [(task, *row) for task, values in results.items() for row in _scores(values)]
    print(align([_TASK_HEAD, *rows], left=3))
    return 0


def _scores(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return metric, filter, score and standard error of a task, whose results have names like `acc,none`."""
    found: list[tuple[str, ...]] = []
    for name, value in values.items():
        metric, has_filter, own = name.partition(",")
        if has_filter and isinstance(value, int | float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{own}")
            found.append((metric, own, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
    return found


def _row(loss: FileLoss) -> tuple[str, ...]:
    counts = (f"{loss.num_documents:,}", f"{loss.num_tokens:,}")
    return (loss.name, *counts, f"{loss.loss:.4f}", f"{loss.perplexity:,.3f}", f"{loss.bits_per_byte:.4f}")


def _numbers(loss: FileLoss) -> dict[str, Any]:
    values = asdict(loss) | {"perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
    # JSON has no infinity.
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
