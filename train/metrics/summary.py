"""Write and read summary.json: how a run ended, with its last losses and its throughput."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...meshes import RunError
from ...meshes.files.own_file import replace_file
from ...meshes.files.regular_file import read_bounded
from .log import finite_or_none, is_finite_or_none

SUMMARY_FILE = "summary.json"

NO_SCHEDULE = "none"
"""The `schedule` of a run without a pipeline."""

_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run and its folder; losses are in nats per token.

    `ended` is "done", "train.seconds" if the time of the run was up, "plateau" if its validation loss no longer fell,
    or the name of the signal that stopped it; a run that a signal stopped has no `final_val_loss`. `tokens_per_s` and
    `wall_time_s` are of this call alone, not of the calls it resumes. `final_val_losses` are those of further
    validation sets by name.
    """

    ended: str
    steps: int
    final_train_loss: float | None
    final_val_loss: float | None
    tokens_per_s: float
    wall_time_s: float
    mesh: str
    schedule: str
    folder: str
    final_val_losses: dict[str, float | None] = field(default_factory=dict)


def summary_values(summary: Summary) -> dict[str, Any]:
    """Return a summary as a dict for JSON, with None for numbers that are not finite."""
    values = {name: finite_or_none(v) if isinstance(v, float) else v for name, v in asdict(summary).items()}
    sets = {name: None if loss is None else finite_or_none(loss) for name, loss in summary.final_val_losses.items()}
    return values | {"final_val_losses": sets}


def write_summary(summary: Summary) -> Path:
    """Write summary.json into the run's folder atomically, and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(summary.folder) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(summary_values(summary), indent=2) + "\n").encode())
    return path


def read_summary(folder: str | Path) -> Summary | None:
    """Return the summary in a run's folder, or None if summary.json is missing or damaged."""
    try:
        content = read_bounded(Path(folder) / SUMMARY_FILE, max_bytes=_MAX_FILE_BYTES, error=RunError)
        summary = Summary(**json.loads(content))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (summary.ended, summary.mesh, summary.schedule, summary.folder)
    numbers = (summary.steps, summary.tokens_per_s, summary.wall_time_s)
    sets = summary.final_val_losses
    if not isinstance(sets, dict):
        return None
    losses = (summary.final_train_loss, summary.final_val_loss, *sets.values())
    is_valid = all(isinstance(text, str) for text in texts) and None not in numbers
    return summary if is_valid and all(map(is_finite_or_none, (*numbers, *losses))) else None


def keep_throughput(summary: Summary, before: Summary | None) -> Summary:
    """Return the summary of a call that took no step, with throughput, mesh and loss of the call before it.

    The loss of its last step may be on no line of metrics.jsonl, where a run ends between two of them.
    """
    if before is None or before.steps != summary.steps:
        return summary
    return replace(
        summary,
        final_train_loss=before.final_train_loss,
        tokens_per_s=before.tokens_per_s,
        wall_time_s=before.wall_time_s,
        mesh=before.mesh,
        schedule=before.schedule,
    )
