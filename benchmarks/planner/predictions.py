"""Predict every quantity of a published row with the planner, beside the measurement.

A vocabulary that a source does not state is swept, and so is rematerialization; a row that lacks anything else is
skipped. Read `training_case.py` for how a row becomes a question to the planner, `accuracy.py` for the errors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import cast

from trellax.plan.costs.layer_time import layer_time
from trellax.plan.costs.layout import PlanRemat
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.pipeline_time import plan_schedule
from trellax.plan.costs.runtime import MEGATRON
from trellax.plan.costs.stage_time import split_layers
from trellax.plan.costs.step_time import step_time
from trellax.plan.machines.collective_time import CollectiveKind, collective_time_s, make_group
from trellax.plan.machines.kernel_time import matmul_time_s
from trellax.schedules import SCHEDULES, StageCost, simulate

from .inference_case import infer_case, infer_predictions
from .qi_bubble import qi_bubble
from .rows import PublishedRow
from .runtime_case import adapter_rank, stated_format
from .skipped import RowSkippedError
from .stated import stated_step_times
from .training_case import TrainCase, row_topology, train_case

_GIB, _GB = 2.0**30, 1e9
_PEAKS = {
    "peak_alloc_gib": _GIB,
    "peak_mem_gib": _GIB,
    "peak_mem_gb": _GB,
    "peak_mem_gb_nvidia_smi": _GB,
    "peak_memory_bytes": 1.0,
}
# A driver's reading includes the CUDA context: 1.3 to 2 GB by the source of these rows (BLOOM chronicles).
_CONTEXT_BYTES = {"peak_mem_gb_nvidia_smi": 1.65e9}
# And across nodes what no program uses: buffers of NCCL and of DeepSpeed, and blocks of the allocator that
# are free. Fitted on nine rows of BLOOM; its runs of one node have none of it.
_NODES_BYTES = {"peak_mem_gb_nvidia_smi": 5.0e9}
_BUBBLES = {"bubble_1f1b": "1f1b", "bubble_zb_h1": "zb-h1", "bubble_1f1b_interleaved": "interleaved-1f1b"}
# NVLink-C2C has 450 GB/s, which two GPUs may share; 16 lanes of PCI Express have 126 at most.
_FAST_HOST = 200e9
_SWEPT_VOCABS = (32000, 51200)
_PASSES = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One number measured and predicted, in the same unit."""

    quantity: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1


def predict_row(row: PublishedRow) -> list[Prediction]:
    """Return a prediction for every quantity of a row that the planner knows.

    Raises:
        RowSkippedError: with the reason.
    """
    if row.provenance.startswith("recalled"):
        raise RowSkippedError("recalled, not seen")
    if row.value_kind in ("error-only", "vendor-spec"):
        raise RowSkippedError(f"{row.value_kind}: no measurement")
    if row.kind not in _KINDS:
        raise RowSkippedError(f"nothing predicts a row of kind {row.kind!r}")
    found = _KINDS[row.kind](row)
    if not found:
        raise RowSkippedError("no quantity that is predicted: " + ", ".join(sorted(row.outputs)))
    # Lines of their own for narrow formats, and for steps that train adapters.
    name = "lora" if adapter_rank(row) else stated_format(row).partition("-")[0]
    if name == "plain" or row.kind not in ("train", "memory"):
        return found
    return [replace(one, quantity=f"{one.quantity} {name}") for one in found]


def resolve_remat(case: TrainCase) -> list[tuple[float, TrainCase]]:
    """Return the rematerialization of a case, as shares of the layers that have one policy or another.

    If several are possible, the least that fits in memory: where a policy needs too much, as many layers as have to
    take the next one, as Megatron's block method does. Beside a host on NVLink what is too much waits in its memory
    instead, if copying it there and back takes less time than the microbatch (Megatron-Bridge's cpu_offloading).
    """
    device = case.topology.accelerator
    limit, found = device.memory_bytes, [(1.0, case)]
    before = None
    for remat in case.remats:
        given = replace(case, layout=replace(case.layout, remat=remat))
        needs = _memory_bytes(given)
        found = [(1.0, given)]
        if needs <= limit:
            if before and before[1] > needs:
                copies_s = 2 * (before[1] - limit) / device.host_bytes_per_s
                if device.host_bytes_per_s > _FAST_HOST and copies_s < _microbatch_s(before[0]):
                    return [(1.0, before[0])]
                share = (before[1] - limit) / (before[1] - needs)
                found = [(1 - share, before[0]), (share, given)]
            break
        before = (given, needs)
    return found


def _microbatch_s(case: TrainCase) -> float:
    return _step_time_s(case) / case.layout.microbatches


def _with_remats(case: TrainCase, shares: tuple[tuple[PlanRemat, float], ...]) -> list[tuple[float, TrainCase]]:
    return [(share, replace(case, layout=replace(case.layout, remat=remat))) for remat, share in shares]


def _memory_bytes(case: TrainCase) -> float:
    ranks = step_memory(case.model, layout=case.layout, num_tokens=case.num_tokens, runtime=case.runtime)
    return fullest(ranks).total


def _step_time_s(case: TrainCase) -> float:
    sizes = {"layout": case.layout, "topology": case.topology, "num_tokens": case.num_tokens}
    return step_time(case.model, runtime=case.runtime, **sizes).time_s


def _train(row: PublishedRow) -> list[Prediction]:
    if "vocab" in row.unstated and "vocab" not in row.inputs:
        return _sweep(row)
    case = train_case(row)
    stated, found = stated_step_times(row, case.model, case.topology), []
    is_stated = len(case.remats) == 1
    cases = _with_remats(case, case.mix) if is_stated else resolve_remat(case)
    keeping = _with_remats(case, case.kept) if is_stated else cases
    predicted = sum(share * _step_time_s(own) for share, own in cases) if stated else 0.0
    for convention, seconds in stated.items():
        quantity = f"step_time by {convention}-attention flops" if convention else "step_time"
        found.append(Prediction(quantity=quantity, measured=seconds, predicted=predicted))
    for name, unit in _PEAKS.items():
        if name in row.outputs:
            needs = sum(share * _memory_bytes(own) for share, own in keeping) + _CONTEXT_BYTES.get(name, 0.0)
            needs += _NODES_BYTES.get(name, 0.0) * (case.topology.num_nodes > 1)
            found.append(Prediction(quantity="memory", measured=unit * row.outputs[name], predicted=needs))
    if not found:
        raise RowSkippedError("no step time or peak memory: " + ", ".join(sorted(row.outputs)))
    return found


def _sweep(row: PublishedRow) -> list[Prediction]:
    """Return the mean predictions of a GPT row without a stated vocabulary over two sizes, Llama's and Megatron's."""
    if "swiglu" in str(row.inputs.get("mlp")):
        raise RowSkippedError("vocab is not stated")
    swept = [_train(replace(row, inputs={**row.inputs, "vocab": size})) for size in _SWEPT_VOCABS]
    return [replace(each[0], predicted=mean(one.predicted for one in each)) for each in zip(*swept, strict=True)]


def _memory(row: PublishedRow) -> list[Prediction]:
    return [prediction for prediction in _train(row) if prediction.quantity == "memory"]


def _layer(row: PublishedRow) -> list[Prediction]:
    case = train_case(row)
    layer = layer_time(
        case.model, layout=case.layout, runtime=case.runtime, topology=case.topology, num_tokens=case.num_tokens
    )
    times = {"forward_ms": layer.forward, "backward_ms": layer.backward, "combined_ms": layer.forward + layer.backward}
    return [
        Prediction(quantity=f"layer_{name.removesuffix('_ms')}", measured=row.outputs[name] / 1e3, predicted=value)
        for name, value in times.items()
        if name in row.outputs
    ]


def _stage(row: PublishedRow) -> list[Prediction]:
    """Predict the times of a middle stage, which has no embedding and no head."""
    case = train_case(replace(row, inputs={"vocab": 51200, **row.inputs}))
    layer = layer_time(
        case.model, layout=case.layout, runtime=case.runtime, topology=case.topology, num_tokens=case.num_tokens
    )
    layers = max(split_layers(case.model.num_layers, num_stages=case.layout.num_stages))
    times = dict(zip(("tf_ms", "tb_ms", "tw_ms"), (getattr(layer, name) for name in _PASSES), strict=True))
    return [
        Prediction(quantity="stage_time", measured=row.outputs[name] / 1e3, predicted=layers * value)
        for name, value in times.items()
        if name in row.outputs
    ]


def _bubble(row: PublishedRow) -> list[Prediction]:
    inputs = row.inputs
    if "tf_ms" not in inputs:
        raise RowSkippedError("times of the stages are not stated")
    ranks, transfer = inputs["pp"], inputs.get("tcomm_ms", 0.0)
    traits = MEGATRON.order_traits
    costs = {name: inputs[key] for name, key in zip(_PASSES, ("tf_ms", "tb_ms", "tw_ms"), strict=True)}
    found = []
    for key, name in _BUBBLES.items():
        if key not in row.outputs:
            continue
        # Interleaved with one layer per chunk; embedding and head count as a layer each.
        chunks = (inputs["layers"] + 2) // ranks if SCHEDULES[name].chunks == "several" else 1
        schedule = plan_schedule(
            name, num_ranks=ranks, num_microbatches=inputs["num_microbatches"], num_chunks=chunks, traits=traits
        )
        if chunks > 1:
            stage = StageCost(**{name: cost / chunks for name, cost in costs.items()})
            predicted = qi_bubble(schedule, stage=stage, transfer=transfer)
        else:
            predicted = simulate(schedule, clock="async", transfer=transfer, **costs).bubble_fraction
        found.append(Prediction(quantity=f"bubble {name}", measured=row.outputs[key], predicted=predicted))
    return found


def _infer(row: PublishedRow) -> list[Prediction]:
    found = infer_predictions(infer_case(row), row)
    if not found:
        raise RowSkippedError("no latency: " + ", ".join(sorted(row.outputs)))
    return [Prediction(quantity=name, measured=pair[0], predicted=pair[1]) for name, pair in found.items()]


def _collective(row: PublishedRow) -> list[Prediction]:
    inputs = row.inputs
    if "ranks" not in inputs:
        raise RowSkippedError("ranks are not stated")
    nodes = inputs.get("nodes", 1)
    topology = row_topology(
        replace(row, inputs={"gpus_per_node": inputs["ranks"] // nodes, **inputs, "gpus": inputs["ranks"]})
    )
    ranks, num_bytes = inputs["ranks"], inputs["bytes"]
    kind = cast("CollectiveKind", inputs["collective"])
    group = make_group(topology, size=ranks, stride=1)
    predicted = collective_time_s(kind, num_bytes=num_bytes, group=group, topology=topology)
    wire = (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * num_bytes
    return [Prediction(quantity="collective", measured=wire / (1e9 * row.outputs["busbw_gbs"]), predicted=predicted)]


def _gemm(row: PublishedRow) -> list[Prediction]:
    name = str(row.inputs["name"]).removeprefix("NVIDIA ")
    if row.inputs.get("dtype") not in ("bf16", "fp16"):
        raise RowSkippedError("products in 8 bit are not modelled")
    case = row_topology(replace(row, inputs={"gpu": name, "gpus": 1}))
    m, n, k = (int(size) for size in str(row.inputs["shape_mnk"]).split("x"))
    predicted = matmul_time_s(case.accelerator.in_bursts, m=m, n=n, k=k, dtype="bfloat16")
    measured = 2 * m * n * k / (1e12 * row.outputs["max_achieved_tflops"])
    return [Prediction(quantity="product", measured=measured, predicted=predicted)]


_KINDS: Mapping[str, Callable[[PublishedRow], list[Prediction]]] = {
    "train": _train,
    "memory": _memory,
    "layer_time": _layer,
    "stage_time": _stage,
    "bubble": _bubble,
    "infer": _infer,
    "collective": _collective,
    "gemm": _gemm,
}
