"""`trellax eval`: print loss, perplexity and bits per byte of a model on files."""

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

_HEAD = ("file", "documents", "tokens", "loss", "perplexity", "bits/byte")


def run_eval(args: argparse.Namespace) -> int:
    """Print a table, or JSON, and return the exit code.

    Raises:
        TrellaxError: model, files or mesh do not fit.
    """
    files = find_named(args.data, option="--data")
    # First, since fake devices must be chosen before jax starts.
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
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


def _row(loss: FileLoss) -> tuple[str, ...]:
    counts = (f"{loss.num_documents:,}", f"{loss.num_tokens:,}")
    return (loss.name, *counts, f"{loss.loss:.4f}", f"{loss.perplexity:,.3f}", f"{loss.bits_per_byte:.4f}")


def _numbers(loss: FileLoss) -> dict[str, Any]:
    values = asdict(loss) | {"perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
    # JSON has no infinity.
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
