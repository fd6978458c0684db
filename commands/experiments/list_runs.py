"""`trellax runs`: list runs with state, loss and speed, or compare some of them; it imports no jax."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from ...meshes import RunError
from ...meshes.columns import align
from ...meshes.errors import suggest
from ...train.metrics.compare_plot import draw_losses
from ...train.metrics.log import read_metrics
from ...train.metrics.run_rows import RunRow, find_runs, is_run, read_config_values, read_run_row
from ..output_file import check_output_files, write_output_file

_HEAD = ("run", "state", "step", "loss", "val loss")
_TAIL = ("tokens/s", "updated")
_NOT_COMPARED = ("run.name", "run.folder")
_STEPS = 10
"""Steps at which the losses of two runs are printed side by side."""


def run_runs(args: argparse.Namespace) -> int:
    """Print the list or the comparison, and return the exit code.

    Raises:
        RunError: a folder is no run, or holds none.
    """
    check_output_files(args.png)
    is_comparison = args.names[:1] == ["compare"]
    folders = [Path(name) for name in args.names[1:]] if is_comparison else find_runs(Path(*args.names or ["runs"]))
    rows = [read_run_row(_check_run(folder)) for folder in folders]
    if args.png:
        write_output_file(args.png, draw_losses(folders, labels=_label(folders)))
    if is_comparison:
        _print_comparison(folders, rows, args)
    elif args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(align(_table(rows), left=2) if rows else "no runs")
    return 0


def _check_run(folder: Path) -> Path:
    if not is_run(folder):
        names = [str(path) for path in folder.parent.glob("*/") if is_run(path)]
        raise RunError(f"{folder} is no run folder.{suggest(str(folder), names)}", fix="name one that trellax wrote.")
    return folder


def _label(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, or their paths where two have one name."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _print_comparison(folders: Sequence[Path], rows: Sequence[RunRow], args: argparse.Namespace) -> None:
    differing = _find_differing([read_config_values(folder) for folder in folders])
    losses = _losses_by_step(folders)
    labels = _label(folders)
    if args.json:
        runs = [asdict(row) | {"folder": str(folder)} for row, folder in zip(rows, folders, strict=True)]
        print(json.dumps({"runs": runs, "config": differing, "losses": losses}))
        return
    table: list[tuple[str, ...]] = [("", *labels)]
    table += list(zip(*_table(rows), strict=True))[1:]
    table += [(key, *map(_text, values)) for key, values in differing.items()]
    table += [(f"loss at step {step}", *map(_number, values)) for step, values in losses.items()]
    print(align(table))


def _find_differing(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each config key in which runs differ."""
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED))
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


def _losses_by_step(folders: Sequence[Path]) -> dict[int, list[float]]:
    """Return the training losses of all runs at about `_STEPS` steps that all have logged, the last included."""
    curves = [
        {line["step"]: line["loss"] for line in read_metrics(folder) if line.get("loss") is not None}
        for folder in folders
    ]
    common = sorted(set[int].intersection(*(set(curve) for curve in curves)))
    every = -(-len(common) // _STEPS) or 1
    return {step: [curve[step] for curve in curves] for step in common[::-1][::every][::-1]}


def _table(rows: Sequence[RunRow]) -> list[tuple[str, ...]]:
    """Return the head and the cells of each run, with a column for each further validation set."""
    names = list(dict.fromkeys(name for row in rows for name in row.val_losses))
    return [(*_HEAD, *names, *_TAIL), *(_cells(row, names) for row in rows)]


def _cells(row: RunRow, names: Sequence[str]) -> tuple[str, ...]:
    step = f"{row.step}/{row.steps}" if row.steps else str(row.step)
    speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
    updated = datetime.fromtimestamp(row.updated_s).strftime("%Y-%m-%d %H:%M")
    losses = (row.train_loss, row.val_loss, *(row.val_losses.get(name) for name in names))
    return (row.name, row.state, step, *map(_number, losses), speed, updated)


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
