"""Convert a published inference row into a question to the planner: model, layout, machine, requests and server.

Read `training_case.py` first, which reads models and machines.
"""

from dataclasses import dataclass, replace

from trellax.layers import ModelConfig
from trellax.plan.costs.inference_time import COMPILED, EAGER, Server, inference_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.product_format import FORMATS
from trellax.plan.costs.serving.held import Held
from trellax.plan.machines.topology import Topology

from .rows import PublishedRow
from .runtime_case import stated_format
from .skipped import RowSkippedError
from .training_case import row_model, row_topology

# gpt-fast generates 200 tokens unless told otherwise; its rows do not say.
_GENERATED = 200
# Kernels that expand 8-bit and 4-bit weights keep less of the bandwidth: gpt-fast's Llama-2-7B on one A100.
_QUANTISED = {"int8": (1.0, 0.82), "int4": (0.5625, 0.62)}


@dataclass(frozen=True, kw_only=True)
class InferCase:
    """Published inference requests."""

    model: ModelConfig
    layout: Layout
    topology: Topology
    server: Server
    batch: int
    prompt: int
    generated: int


def infer_case(row: PublishedRow) -> InferCase:
    """Return the requests of a row.

    Raises:
        RowSkippedError: an input is missing, or the planner has no model of it.
    """
    inputs = row.inputs
    if "-megatron-" in row.id:
        raise RowSkippedError("served by Megatron in PyTorch, which recomputes and starts kernels as in training")
    if str(inputs.get("gpu", "")).startswith("TPU"):
        raise RowSkippedError("weights split over two axes of a torus are not modelled")
    if "batch" not in inputs:
        raise RowSkippedError("batch is not stated")
    model = row_model(replace(row, inputs={"vocab": 51200, **inputs, "seq": 1 << 16}))
    gpus = inputs.get("gpus", inputs.get("tp", 1) * inputs.get("pp", 1))
    topology = row_topology(replace(row, inputs={**inputs, "gpus": gpus}))
    return InferCase(
        model=model,
        layout=Layout(tensor=inputs.get("tp", 1), pipe=inputs.get("pp", 1)),
        topology=topology,
        server=_server(row),
        batch=inputs["batch"],
        prompt=inputs.get("input_len", inputs.get("context", 0)),
        generated=inputs.get("output_len", _GENERATED),
    )


def infer_predictions(case: InferCase, row: PublishedRow) -> dict[str, tuple[float, float]]:
    """Return (measured, predicted) seconds of every quantity of the row: latency, prefill, decode."""
    out, found = row.outputs, {}
    sizes = {"layout": case.layout, "topology": case.topology, "server": case.server}
    whole = inference_time(case.model, batch=case.batch, prompt=case.prompt, generated=case.generated, **sizes)
    for key in ("latency_ms", "total_ms"):
        if key in out:
            found["latency"] = (out[key] / 1e3, whole.latency_s)
    for name, gpus in (("output_tokens_per_s", 1), ("output_tokens_per_s_per_gpu", case.topology.num_devices)):
        if name in out:
            found["latency"] = (case.batch * case.generated / (gpus * out[name]), whole.latency_s)
    if "output_tokens_per_s_as_printed" in out:
        if case.topology.num_devices > 1:
            raise RowSkippedError("tokens/s per GPU or in all: not stated")
        found["latency"] = (case.batch * case.generated / out["output_tokens_per_s_as_printed"], whole.latency_s)
    for name in ("prefill_ms", "first_token_ms"):
        if name in out:
            found["prefill"] = (out[name] / 1e3, whole.prefill_s)
    if "decode_ms_per_token" in out:
        found["decode"] = (out["decode_ms_per_token"] / 1e3, whole.decode_s)
    return found


def _server(row: PublishedRow) -> Server:
    framework = str(row.inputs.get("framework", ""))
    server = replace(COMPILED, all_reduce="direct") if "compile" in framework else EAGER
    precision = str(row.inputs.get("precision", ""))
    narrow = stated_format(row)
    if narrow != "plain":
        # Weights are stored as they are multiplied, and so are keys and values.
        size = FORMATS[narrow].item_bytes
        return replace(COMPILED, products=narrow, held=Held(weight=size, cached=size))
    for name, (size, share) in _QUANTISED.items():
        if precision.startswith(name):
            return replace(server, held=Held(weight=size), expand_share=share)
    return server
