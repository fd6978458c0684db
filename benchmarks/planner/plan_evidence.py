"""Write the errors that plans carry, `plan/evidence.toml`, from the benchmark: held-out rows by source and accelerator.

`run.py FOLDER --evidence plan/evidence.toml` calls this. Counted are steps and tokens that are stated as such, in
bfloat16 and fp8; the rows of one source on one accelerator are a line, and a single row is not enough for one.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from benchmarks.planner.accuracy import Accuracy, RowError
from benchmarks.planner.training_case import row_topology

_HEAD = """\
# How far off the planner is by accelerator and kind of row: mean absolute errors over published rows that nothing was
# fitted on, by source and accelerator: steps and tokens that are stated as such, in bfloat16 and fp8. Left out are
# accelerators with one row of a source. error is a share of the measurement. Read evidence.py next.
# Written by:  python benchmarks/planner/run.py FOLDER --evidence plan/evidence.toml
"""

_QUANTITIES = {
    "step_time": ("train", "bfloat16"),
    "step_time fp8": ("train", "fp8"),
    "decode": ("serve", "bfloat16"),
    "latency": ("serve", "bfloat16"),
}
"""Quantities of the benchmark that plans predict, with the kind of plan and `model.matmuls`."""

_NAMES: Mapping[str, str] = {
    "bigscience_bloom": "BLOOM",
    "dgxc_benchmarking": "NVIDIA's recipes",
    "fastertransformer": "FasterTransformer",
    "gpt_fast": "gpt-fast",
    "jax_toolbox": "JAX-Toolbox",
    "kipply_13b": "kipply",
    "korthikanti2022": "Korthikanti et al. 2022",
    "llm_foundry": "LLM Foundry",
    "maxtext": "MaxText",
    "megatron_bridge": "Megatron Bridge",
    "nanotron_ultrascale": "Nanotron",
    "narayanan2021": "Narayanan et al. 2021",
    "nemo_perf": "NeMo",
    "simumax_b200_a100": "SimuMax",
    "tensorrt_llm": "TensorRT-LLM",
    "torchtitan": "torchtitan",
    "vtrain2024": "vTrain 2024 (many nodes)",
    "vtrain2024/single_node": "vTrain 2024 (one node)",
    "zero_bubble2024": "Zero Bubble 2024",
}
"""How plans name a source; another has its own id."""


def format_evidence(accuracies: Iterable[Accuracy], *, date: str) -> str:
    """Return the errors that plans carry as TOML.

    Args:
        date: day of the measurement, written beside every line.
    """
    return "\n".join([_HEAD, *(f"{_format_line(line)}date = {_quote(date)}\n" for line in list_evidence(accuracies))])


def list_evidence(accuracies: Iterable[Accuracy]) -> list[dict[str, object]]:
    """Return mean errors of held-out rows, one line for each source, kind of plan, format and accelerator."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for one in accuracies:
        if one.quantity not in _QUANTITIES:
            continue
        for error in _held_out(one.errors):
            key = (one.source, *_QUANTITIES[one.quantity], row_topology(error.row).accelerator.key)
            found.setdefault(key, []).append(abs(error.prediction.error))
    return [
        {
            "name": _NAMES.get(source, source),
            "key": source,
            "kind": kind,
            "matmuls": matmuls,
            "accelerators": [accelerator],
            "error": round(mean(errors), 3),
            "rows": len(errors),
        }
        for (source, kind, matmuls, accelerator), errors in sorted(found.items())
        if len(errors) > 1
    ]


def _held_out(errors: Sequence[RowError]) -> Iterable[RowError]:
    return (error for error in errors if not error.is_calibrating)


def _format_line(line: Mapping[str, object]) -> str:
    return "[[sources]]\n" + "".join(f"{name} = {_format_value(value)}\n" for name, value in line.items())


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_quote(str(one)) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.3f}"
    return _quote(value) if isinstance(value, str) else str(value)


def _quote(text: str) -> str:
    return f'"{text}"'
