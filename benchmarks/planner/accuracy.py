"""Measure the planner's error against published measurements, source by source, calibrated rows apart.

Read `run.py` for the command.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from .predictions import Prediction, predict_row
from .rows import PublishedRow
from .skipped import RowSkippedError

CALIBRATION: Mapping[str, Mapping[str, str]] = {
    "collectives": {"": "the curves of all-reduces inside a node"},
    "hardware": {"mamf": "largest share of the peak"},
    "korthikanti2022": {"table4": "shares of the memory bandwidth, and of A100's peak in training"},
    "dgxc_benchmarking": {
        "step_time v25.04.02-Llama3.1-8B-BF16": "share of H100's peak in training, 16 bits",
        "step_time fp8 v25.04.02-Llama3.1": "share of H100's peak in training, 8 bits",
        "bf16-256-GB200": "share of GB200's peak in training, 16 bits",
        "fp8-256-GB200": "share of GB200's peak in training, 8 bits",
    },
    "megatron_bridge": {
        "nvfp4 26.04-pretrain-DGX-GB200": "share of GB200's peak, 4 bits",
        "nvfp4 26.02-pretrain-DGX-GB200": "share of GB200's peak, 4 bits",
    },
    "vtrain2024/single_node": {"gpus2-": "seconds of the host for a layer, bytes of the optimizer"},
    "bigscience_bloom": {
        "L704": "speed of products with unaligned heads",
        "L740": "speed of products with unaligned heads",
        "memory L5": "of a driver's reading across nodes, bytes that no program uses",
    },
    "narayanan2021": {"table2-zero3": "ZeRO-3 without overlap, over one adapter of a node"},
    "llm_foundry": {"a100": "of eager code: a layer's wait for its host, and the waits of nodes for each other"},
    "simumax_b200_a100": {
        "memory": "temporary buffers that are alive together",
        "step_time llama3_405b": "share of B200's peak in training, 16 bits",
    },
    "gpt_fast": {"Llama-2-7B": "gaps between kernels, direct all-reduce, expansion of weights"},
    "fastertransformer": {"GPT-350M": "seconds of the host for a layer", "GPT-6.7B": "seconds of the host for a layer"},
}
"""Source -> part of "quantity id" -> the constants that were fitted on such rows. All other rows are held out."""


@dataclass(frozen=True, kw_only=True)
class RowError:
    """One quantity of one row, and whether a constant of the planner was fitted on it."""

    row: PublishedRow
    prediction: Prediction
    is_calibrating: bool


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Errors of one quantity of one source, as shares of the measurement, for all rows and for those held out.

    `mape` is the mean absolute percentage error, `bias` the mean of predicted over measured minus 1, `worst` the id of
    the row with the largest error.
    """

    source: str
    quantity: str
    used: int
    calibrating: int
    skipped: Mapping[str, int]
    mape: float
    bias: float
    held_out_mape: float | None
    worst: str
    worst_error: float
    errors: Sequence[RowError]


def measure_accuracy(rows: Mapping[str, Iterable[PublishedRow]]) -> list[Accuracy]:
    """Return the accuracy of every source and quantity; a source with only skipped rows has quantity "".

    Args:
        rows: by source, as `read_published` returns them.
    """
    found: list[Accuracy] = []
    for source, of_source in rows.items():
        errors, skipped = _predict(of_source)
        quantities = list(dict.fromkeys(error.prediction.quantity for error in errors))
        if not quantities:
            found.append(_summarise(source, "", [], skipped))
        for quantity in quantities:
            own = [error for error in errors if error.prediction.quantity == quantity]
            found.append(_summarise(source, quantity, own, skipped))
    return found


def is_calibrating(row: PublishedRow, quantity: str) -> bool:
    """Return whether a constant of the planner was fitted on this row."""
    parts = CALIBRATION.get(row.source, {})
    return any(part in f"{quantity} {row.id}" for part in parts)


def _predict(rows: Iterable[PublishedRow]) -> tuple[list[RowError], dict[str, int]]:
    errors: list[RowError] = []
    skipped: dict[str, int] = {}
    for row in rows:
        try:
            predictions = predict_row(row)
        except RowSkippedError as skip:
            skipped[str(skip)] = skipped.get(str(skip), 0) + 1
            continue
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            # A new file may hold anything; a row that cannot be read must not stop the others.
            reason = f"cannot be read: {type(error).__name__} {error}".splitlines()[0]
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        errors += [
            RowError(row=row, prediction=one, is_calibrating=is_calibrating(row, one.quantity)) for one in predictions
        ]
    return errors, skipped


def _summarise(source: str, quantity: str, errors: Sequence[RowError], skipped: Mapping[str, int]) -> Accuracy:
    values = [error.prediction.error for error in errors]
    held_out = [abs(error.prediction.error) for error in errors if not error.is_calibrating]
    worst = max(errors, key=lambda error: abs(error.prediction.error), default=None)
    return Accuracy(
        source=source,
        quantity=quantity,
        used=len(errors),
        calibrating=sum(error.is_calibrating for error in errors),
        skipped=skipped,
        mape=mean(map(abs, values)) if values else 0.0,
        bias=mean(values) if values else 0.0,
        held_out_mape=mean(held_out) if held_out else None,
        worst=worst.row.id if worst else "",
        worst_error=worst.prediction.error if worst else 0.0,
        errors=errors,
    )
