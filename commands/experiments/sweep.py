"""`trellax sweep`: train a config with every combination of some keys, as runs in one folder, with a table and a plot.

Runs are taken one after another in one process, so those that differ in numbers alone share compiled programs. The same
command goes on: runs that are done are not taken again.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...configs.changes import list_changes
from ...configs.run_config import RunConfig, load_config
from ...meshes import ConfigError, TrellaxError, use_fake_devices
from ...meshes.columns import align
from ...meshes.errors import LostProcessError, shown
from ...meshes.files.own_file import replace_file
from ...train.loop import check_start, train
from ...train.metrics import Summary, read_summary
from ...train.metrics.compare_plot import draw_losses
from ...train.metrics.plateau import PLATEAU
from ...train.metrics.run_rows import read_config_values, read_run_row
from ...train.stop import BUDGET
from ...train.xla import prepare_backend

_MOST_RUNS = 1000
_NAME = re.compile(r"[^/\\]*[^/\\.][^/\\]*")
_PLAIN = re.compile(r"[^\w.+-]+")


def run_sweep(config: RunConfig, args: argparse.Namespace) -> int:
    """Train the runs, print the table, and return the exit code: 0 if all are done, 2 if one has failed.

    Raises:
        TrellaxError: a combination does not fit itself or the devices; nothing is trained then.
    """
    grid = _read_grid(args.grid)
    configs = _make_configs(config, grid, args)
    # The checks start jax, and `train` would come too late with what its backend reads; it prints the warning.
    prepare_backend()
    if config.run.fake_devices:
        use_fake_devices(config.run.fake_devices)
    for own in configs.values():
        check_start(own)
    folder = next(iter(configs.values())).run_folder.parent
    failed = False
    for number, own in enumerate(configs.values(), 1):
        print(f"run {number}/{len(configs)}  {own.run.name}", file=sys.stderr)
        try:
            summary = _train_unless_done(own)
        except LostProcessError:
            raise
        except TrellaxError as error:
            failed = True
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            continue
        if summary.ended not in ("done", BUDGET, PLATEAU):
            print(f"stopped by {summary.ended}; the same command goes on", file=sys.stderr)
            break
    begun = {values: own for values, own in configs.items() if own.run_folder.is_dir()}
    if begun:
        _report(folder, list(grid), begun, args)
    return 2 if failed else 0


def _read_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Parse `--grid KEY=V,V` into the values of each key."""
    grid: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not all(values) or "." not in key:
            raise ConfigError(
                f"--grid {word}: expected a key and its values, none of them empty.",
                fix="write optimizer.learning_rate=1e-4,3e-4.",
            )
        if key in grid or len(set(values)) < len(values):
            raise ConfigError(f"--grid {word}: a key, or a value, is given twice.", fix="give each once.")
        grid[key] = values
    return grid


def _make_configs(
    config: RunConfig, grid: Mapping[str, Sequence[str]], args: argparse.Namespace
) -> dict[tuple[str, ...], RunConfig]:
    """Return the config of each combination of values, in the order of the grid."""
    if args.name is not None and not _NAME.fullmatch(args.name):
        raise ConfigError(f"--name {shown(args.name)} is no name of a folder.", fix="write a name without slashes.")
    combinations = list(itertools.product(*grid.values()))
    if len(combinations) > _MOST_RUNS:
        raise ConfigError(
            f"the grid has {len(combinations):,} runs; {_MOST_RUNS:,} are the most.", fix="leave out some."
        )
    folder = Path(config.run.folder) / (args.name or f"{config.run.name}-sweep")
    configs = {}
    for values in combinations:
        pairs = list(zip(grid, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={_PLAIN.sub('_', value)}" for key, value in pairs)
        words = [f"--{key}={value}" for key, value in pairs]
        own = [*args.overrides, *words, f"--run.folder={folder}", f"--run.name={name}"]
        configs[values] = load_config(args.config, own)
    if len({own.run.name for own in configs.values()}) < len(configs):
        raise ConfigError("two runs of the grid have one name.", fix="give values that differ in letters or digits.")
    return configs


def _train_unless_done(config: RunConfig) -> Summary:
    """Return the summary of a run that is done with this config, or train it."""
    summary = read_summary(config.run_folder)
    if summary and summary.ended == "done" and summary.steps >= config.train.steps and _is_same(config):
        return summary
    return train(config)


def _is_same(config: RunConfig) -> bool:
    saved: dict[str, dict[str, Any]] = {}
    for name, value in read_config_values(config.run_folder).items():
        section, _, key = name.partition(".")
        saved.setdefault(section, {})[key] = value
    try:
        return not list_changes(saved, config)
    except ConfigError:
        return False


def _report(
    folder: Path, keys: Sequence[str], configs: Mapping[tuple[str, ...], RunConfig], args: argparse.Namespace
) -> None:
    """Write sweep.json and loss.png into the folder of the runs, and print the table."""
    folders = [config.run_folder for config in configs.values()]
    rows = [read_run_row(own) for own in folders]
    found = [
        {"values": dict(zip(keys, values, strict=True)), "folder": str(own)} | asdict(row)
        for values, own, row in zip(configs, folders, rows, strict=True)
    ]
    replace_file(folder / "sweep.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(folder / "loss.png", draw_losses(folders, labels=[row.name for row in rows]))
    if args.json:
        print(json.dumps(found))
        return
    losses = [row.val_loss for row in rows if row.val_loss is not None]
    table: list[tuple[str, ...]] = [
        (*(key.rpartition(".")[2] for key in keys), "state", "step", "loss", "val loss", "tokens/s", "")
    ]
    for values, row in zip(configs, rows, strict=True):
        numbers = ("" if loss is None else f"{loss:.4f}" for loss in (row.train_loss, row.val_loss))
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        best = "best" if losses and row.val_loss == min(losses) else ""
        table.append((*values, row.state, str(row.step), *numbers, speed, best))
    print(align(table, left=len(keys) + 1))
    print(f"{folder}: sweep.json, loss.png, and a folder for each run")
