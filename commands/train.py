"""`trellax train`: train a model as a config says, and print the summary of the run."""

import argparse
import json
import sys

from ..configs.changes import Changes
from ..configs.run_config import RunConfig
from ..meshes.processes.messages import is_first
from ..train.loop import train
from ..train.metrics import NO_SCHEDULE, Summary, summary_values
from ..train.metrics.plateau import PLATEAU
from ..train.run_folder import Start
from . import processes
from .standard_streams import LostOutputError


def run_train(config: RunConfig, args: argparse.Namespace) -> int:
    """Train, and print the summary on process 0.

    Returns the exit code. A lost stdout is an error only with --json: otherwise the run folder is the result.

    Raises:
        TrellaxError: the run cannot start or cannot continue.
    """
    start: Start = "resume" if not args.fresh else "replace" if args.force else "fresh"
    changes: Changes = "accept" if args.override else "refuse"
    with processes.join_run(args, config, start=start, changes=changes):
        summary = train(config, start=start, changes=changes, profile_steps=args.profile)
    if not is_first():
        return 0
    try:
        print(json.dumps(summary_values(summary)) if args.json else _describe_summary(summary), flush=True)
    except LostOutputError as lost:
        print(f"{lost}; all is in {summary.folder}", file=sys.stderr)
        return lost.exit_code if args.json else 0
    return 0


def _describe_summary(summary: Summary) -> str:
    if summary.ended not in ("done", PLATEAU):
        return (
            f"stopped by {summary.ended} after step {summary.steps}, saved in {summary.folder}; "
            "the same command goes on"
        )
    pace = f", {summary.tokens_per_s:,.0f} tokens/s" if summary.tokens_per_s else ""
    schedule = "" if summary.schedule == NO_SCHEDULE else f" with {summary.schedule}"
    why = f", ended on a {PLATEAU}" if summary.ended == PLATEAU else ""
    sets = "".join(f"   {name} {_format_loss(loss)}" for name, loss in summary.final_val_losses.items())
    return (
        f"{summary.steps} steps on {summary.mesh}{schedule} in {summary.wall_time_s:.0f} s{pace}{why}\n"
        f"train loss {_format_loss(summary.final_train_loss)}   "
        f"validation loss {_format_loss(summary.final_val_loss)}{sets}\n"
        f"{summary.folder}: config.toml, summary.json, metrics.jsonl, loss.png, tensorboard, checkpoints"
    )


def _format_loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
