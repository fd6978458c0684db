"""Compare the planner with published measurements, for every file of a folder.

Command:  python benchmarks/planner/run.py FOLDER [--json] [--rows SOURCE] [--write DOCS] [--evidence FILE]
Time: half a minute on one core.

A row that states enough is predicted, any other is skipped with a reason. `fitted` counts the rows on which constants
were fitted; `held out` is the error of the others. Steps in 8 and 4 bits and those that train adapters have lines of
their own, such as "step_time fp8". Sweeps are ranked as well: for every model, number of GPUs and batch, the measured
time of the planner's first layout over the best one measured. With --write the page of evidence is written, with
--evidence the errors that `trellax plan` prints beside its plans.
"""

import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from trellax.meshes import DataError, TrellaxError
from trellax.meshes.columns import align
from trellax.meshes.errors import suggest

from benchmarks.arguments import make_parser
from benchmarks.planner.accuracy import CALIBRATION, Accuracy, measure_accuracy
from benchmarks.planner.evidence import write_evidence
from benchmarks.planner.plan_evidence import format_evidence
from benchmarks.planner.ranking import Ranking, rank_sweeps
from benchmarks.planner.rows import PublishedRow, read_published
from benchmarks.tables import Rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or JSON by source, and return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="folder of TOML files of measurements")
    parser.add_argument("--rows", metavar="SOURCE", help="print every row of one source")
    parser.add_argument("--write", metavar="DOCS", help="write the page of evidence below this folder, docs say")
    parser.add_argument("--evidence", metavar="FILE", help="write the errors that plans carry, plan/evidence.toml say")
    arguments = parser.parse_args(argv)
    if arguments.rows and (arguments.write or arguments.evidence):
        parser.error("--rows reads one source; leave it out where --write or --evidence write the errors of all")
    try:
        published = _read_sources(arguments.folder, arguments.rows)
    except TrellaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    accuracies = measure_accuracy(published)
    rankings = rank_sweeps(accuracies)
    written: list[Path] = []
    if arguments.write:
        written += write_evidence(accuracies, rankings, docs=Path(arguments.write))
    if arguments.evidence:
        Path(arguments.evidence).write_text(format_evidence(accuracies, date=date.today().isoformat()))
        written.append(Path(arguments.evidence))
    if written:
        print(*written, sep="\n")
    elif arguments.json:
        print(json.dumps(_list_numbers(accuracies, rankings), indent=2))
    elif arguments.rows:
        print(_format_rows(accuracies))
    else:
        print(_format_tables(accuracies, rankings))
    return 0


def _read_sources(folder: str, source: str | None) -> dict[str, list[PublishedRow]]:
    """Return the rows of one source, or of all if `source` is None."""
    published = read_published(folder)
    if source is None:
        return published
    if source not in published:
        raise DataError(
            f"no source {source!r} in {folder}; there are {', '.join(published)}.{suggest(source, published)}",
            fix="name one of them, or leave out --rows.",
        )
    return {source: published[source]}


def _list_numbers(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Return the numbers of each source for its first quantity, and of further ones as `source:quantity`."""
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
                "near_ties": ranking.near_ties,
                "repeats": list(ranking.repeats),
            }
    return found


def _format_tables(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking]) -> str:
    """Return the tables of errors, of skipped rows, of ranked sweeps and of fitted rows."""
    parts = {
        "errors": align(_list_errors(accuracies), left=(0, 1, 8)),
        "skipped": align(_list_skipped(accuracies), left=(0, 2)),
        "ranking of sweeps: the planner's first layout, measured, over the best one measured": align(
            _list_rankings(rankings), left=(0, 7)
        ),
        "fitted on": align(_list_calibration(), left=3),
    }
    return "\n\n".join(f"{title}\n{table}" for title, table in parts.items())


def _list_errors(accuracies: Sequence[Accuracy]) -> Rows:
    rows: Rows = [("source", "quantity", "rows", "fitted", "error", "bias", "held out", "worst", "row")]
    for one in accuracies:
        if one.used:
            counts = (str(one.used), str(one.calibrating))
            held_out = "-" if one.held_out_mape is None else f"{one.held_out_mape:.1%}"
            errors = (f"{one.mape:.1%}", f"{one.bias:+.1%}", held_out, f"{one.worst_error:+.1%}")
            rows.append((one.source, one.quantity, *counts, *errors, one.worst))
    return rows


def _list_skipped(accuracies: Sequence[Accuracy]) -> Rows:
    # The quantities of a source share its skipped rows.
    skipped = {one.source: one.skipped for one in accuracies}
    reasons = [(source, str(count), reason) for source, counts in skipped.items() for reason, count in counts.items()]
    return [("source", "rows", "reason"), *reasons]


def _list_rankings(rankings: Sequence[Ranking]) -> Rows:
    rows: Rows = [("source", "groups", "within 5%", "mean", "worst", "near ties", "noise", "row")]
    for one in rankings:
        regrets = (f"{one.mean_regret:+.1%}", f"{one.worst_regret:+.1%}")
        rows.append(
            (one.source, str(one.groups), str(one.within), *regrets, f"{one.near_ties:.1f}", one.noise, one.worst)
        )
    return rows


def _list_calibration() -> Rows:
    fitted = [(source, part or "all", what) for source, parts in CALIBRATION.items() for part, what in parts.items()]
    return [("source", "rows", "constants"), *fitted]


def _format_rows(accuracies: Sequence[Accuracy]) -> str:
    """Return a table with every prediction of the sources, in the unit of its measurement."""
    rows: Rows = [("row", "quantity", "measured", "predicted", "error", "")]
    for one in accuracies:
        for error in one.errors:
            pair = error.prediction
            numbers = (f"{pair.measured:.6g}", f"{pair.predicted:.6g}", f"{pair.error:+.1%}")
            rows.append((error.row.id, pair.quantity, *numbers, "fitted" if error.is_calibrating else ""))
    return align(rows, left=(0, 1, 5))


if __name__ == "__main__":
    sys.exit(main())
