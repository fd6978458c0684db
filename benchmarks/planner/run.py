"""Compare the planner with published measurements, for every file of a folder.

    python benchmarks/planner/run.py FOLDER [--json] [--rows SOURCE]

A row that states enough is predicted, any other is skipped with a reason. `fitted` counts the rows on which constants
were fitted; `held out` is the error of the others. Rows in 8 and 4 bits are predicted as 16-bit ones, in lines of their
own such as "step_time fp8 as bf16": that error shows the gain of the precision. Sweeps are ranked as well: for every
model, number of GPUs and batch, the measured time of the planner's first layout over the best one measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from trellax.meshes import TrellaxError

from benchmarks.planner.accuracy import CALIBRATION, Accuracy, measure_accuracy
from benchmarks.planner.ranking import Ranking, rank_sweeps
from benchmarks.planner.rows import read_published


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON, and return the exit code."""
    parser = argparse.ArgumentParser(description="The planner's error against published measurements.")
    parser.add_argument("folder", help="folder of TOML files of the published schema")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: source -> used, skipped, mape, bias, worst, ..."
    )
    parser.add_argument("--rows", metavar="SOURCE", help="print every row of one source")
    args = parser.parse_args(argv)
    try:
        published = read_published(args.folder)
    except TrellaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.rows:
        published = {name: rows for name, rows in published.items() if name == args.rows}
    accuracies = measure_accuracy(published)
    rankings = rank_sweeps(accuracies)
    if args.json:
        print(json.dumps(_numbers(accuracies, rankings), indent=2))
    elif args.rows:
        print(_draw_rows(accuracies))
    else:
        print(_draw_table(accuracies, rankings))
    return 0


def _numbers(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Source -> its first quantity; further quantities as `source:quantity`."""
    found: dict[str, Any] = {}
    ranking_of = {ranking.source: ranking for ranking in rankings}
    for one in accuracies:
        key = f"{one.source}:{one.quantity}" if one.source in found else one.source
        found[key] = {
            "quantity": one.quantity,
            "used": one.used,
            "skipped": sum(one.skipped.values()),
            "mape": one.mape,
            "bias": one.bias,
            "worst": {"id": one.worst, "error": one.worst_error},
            "calibrating": one.calibrating,
            "held_out_mape": one.held_out_mape,
            "skipped_why": dict(one.skipped),
        }
        if one.source in ranking_of and one.quantity == "step_time":
            ranking = ranking_of[one.source]
            found[key]["ranking"] = {
                "groups": ranking.groups,
                "within_5_percent": ranking.within,
                "mean_regret": ranking.mean_regret,
                "worst_regret": ranking.worst_regret,
            }
    return found


def _draw_table(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking]) -> str:
    lines = [f"{'source':<26}{'quantity':<26}{'rows':>5}{'fitted':>7}{'error':>8}{'bias':>8}{'held out':>9}  worst"]
    for one in accuracies:
        if not one.used:
            continue
        held = "-" if one.held_out_mape is None else f"{one.held_out_mape:.1%}"
        lines.append(
            f"{one.source:<26}{one.quantity:<26}{one.used:>5}{one.calibrating:>7}{one.mape:>8.1%}{one.bias:>+8.1%}"
            f"{held:>9}  {one.worst_error:+.1%} {one.worst}"
        )
    lines += ["", "skipped"]
    for source, skipped in {one.source: one.skipped for one in accuracies}.items():
        lines += [f"  {source:<26}{count:>4}  {reason}" for reason, count in skipped.items()]
    lines += ["", "ranking of sweeps: the planner's first layout, measured, over the best one measured"]
    for ranking in rankings:
        lines.append(
            f"  {ranking.source:<26}{ranking.groups:>4} groups, {ranking.within} within 5%, "
            f"mean {ranking.mean_regret:+.1%}, worst {ranking.worst_regret:+.1%} ({ranking.worst})"
        )
    lines += ["", "fitted on"]
    for source, parts in CALIBRATION.items():
        lines += [f"  {source:<26}{part or 'all rows'}: {what}" for part, what in parts.items()]
    return "\n".join(lines)


def _draw_rows(accuracies: Sequence[Accuracy]) -> str:
    lines = []
    for one in accuracies:
        for error in one.errors:
            pair = error.prediction
            mark = " fitted" if error.is_calibrating else ""
            lines.append(
                f"{error.row.id:<50}{pair.quantity:<26}{pair.measured:>14.6g}{pair.predicted:>14.6g}"
                f"{pair.error:>+8.1%}{mark}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
