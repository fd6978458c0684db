"""Read how a run stands from its folder, without jax and without disturbing it: state, steps, losses and speed."""

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.resolved_config import CONFIG_FILE
from ...hub.saves.names import FOLDER
from ...meshes import RunError
from ...meshes.files.regular_file import read_bounded
from ..folder_lock import find_holder
from .log import METRICS_FILE, last_loss, last_set_losses, read_metrics
from .plateau import PLATEAU
from .summary import SUMMARY_FILE, Summary, read_summary

_MAX_CONFIG_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """How a run stands.

    `state` is "done", "plateau" (the validation loss no longer fell), "running", "stopped by" a signal or
    train.seconds, "killed" (its process is gone), "failed" (it ended with an error), or "not begun". `step` is the last
    one that was logged, or saved at the end, of `steps`, which is 0 if the folder has no config that says it. Losses
    are in nats per token, None if none was logged; `val_losses` are those of further validation sets by name.
    """

    name: str
    state: str
    step: int
    steps: int
    train_loss: float | None
    val_loss: float | None
    val_losses: dict[str, float]
    tokens_per_s: float | None
    updated_s: float


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in a folder, the one that was changed last at the end; links are left out.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder, so there are no runs in it.", fix="name the folder that holds runs.")
    found = [path for path in folder.iterdir() if not path.is_symlink() and is_run(path)]
    return sorted(found, key=lambda path: (_updated_s(path), path.name))


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return path.is_dir() and any((path / name).exists() for name in (METRICS_FILE, SUMMARY_FILE, FOLDER))


def read_run_row(folder: Path) -> RunRow:
    """Return how a run stands.

    Raises:
        RunError: a file of the run is not a regular file, or too large.
    """
    summary, lines = read_summary(folder), read_metrics(folder)
    step = max([line["step"] for line in lines] + [summary.steps if summary else 0])
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s") is not None]
    validations = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    steps = read_config_values(folder).get("train.steps", 0)
    return RunRow(
        name=folder.name,
        state=_find_state(folder, summary, step=step),
        step=step,
        steps=steps if isinstance(steps, int) else 0,
        train_loss=last_loss(lines, step=step),
        val_loss=validations[-1] if validations else None,
        val_losses=last_set_losses(lines),
        tokens_per_s=summary.tokens_per_s if summary and summary.steps == step else (speeds or [None])[-1],
        updated_s=_updated_s(folder),
    )


def read_config_values(folder: Path) -> dict[str, Any]:
    """Return the values of a run's config.toml by `section.key`, {} if it has none.

    Raises:
        RunError: it is not a regular file, or too large.
    """
    try:
        content = read_bounded(folder / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES, error=RunError)
        sections = tomllib.loads(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return {}
    tables = {name: table for name, table in sections.items() if isinstance(table, Mapping)}
    return {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}


def _find_state(folder: Path, summary: Summary | None, *, step: int) -> str:
    holder = find_holder(folder)
    if holder:
        process, host = holder
        # Of another machine nothing else is known than that the run has not ended by itself.
        return "running" if host != socket.gethostname() or _is_alive(process) else "killed"
    if summary and summary.steps >= step:
        return summary.ended if summary.ended in ("done", PLATEAU) else f"stopped by {summary.ended}"
    return "failed" if step else "not begun"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _updated_s(folder: Path) -> float:
    """Return when the files of a run were last changed, in seconds since 1970."""
    files = [folder / name for name in (METRICS_FILE, SUMMARY_FILE, FOLDER)]
    return max([file.stat().st_mtime for file in files if file.exists()], default=0.0)
