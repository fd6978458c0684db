"""Compute the time of one layer on one device: forward, both gradients, recomputation, and collectives over tensor.

Read `stage_time.py` next.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...layers import ModelConfig
from ...layers.attention.counts import attention_widths
from ...meshes import PlanError
from ...meshes.arguments import check_count
from ..machines.collective_time import CollectiveKind, collective_time_s, make_group
from ..machines.kernel_time import flash_time_s, matmul_time_s, memory_time_s
from ..machines.topology import Accelerator, Topology
from .context_time import context_time
from .layout import Layout
from .operations import Flash, LayerSize, Operation, Part, Product, item_bytes, layer_operations
from .runtime import Runtime

_PASSES = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer for one microbatch, collectives included; `recompute` is repeated work of the backward.

    `exposed` are the seconds of the other four in which the device waits for others over tensor, expert, context.
    """

    forward: float
    recompute: float
    input_grad: float
    weight_grad: float
    exposed: float

    @property
    def backward(self) -> float:
        """Seconds of recomputation and both gradients."""
        return self.recompute + self.input_grad + self.weight_grad


def sum_times(times: Iterable[tuple[LayerTime, int]]) -> LayerTime:
    """Return the seconds of several layers one after another, given how many there are of each kind."""
    pairs = list(times)
    names = ("forward", "recompute", "input_grad", "weight_grad", "exposed")
    return LayerTime(**{name: sum(count * getattr(each, name) for each, count in pairs) for name in names})


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Seconds of one operation by pass, without collectives."""

    part: Part
    forward: float
    input_grad: float
    weight_grad: float = 0.0


def layer_time(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, topology: Topology, num_tokens: int
) -> LayerTime:
    """Return the seconds of one layer for one microbatch of `layout.sequences` sequences of `num_tokens` tokens.

    Raises:
        PlanError: `num_tokens` is below 1.
    """
    check_count("num_tokens", num_tokens, error=PlanError)
    queries = num_tokens / layout.context
    size = LayerSize(
        sequences=layout.sequences, queries=queries, keys=num_tokens, tensor=layout.tensor, expert=layout.expert
    )
    operations = layer_operations(model, size=size, runtime=runtime)
    works = [_time_operation(operation, topology.accelerator, runtime, model.dtype) for operation in operations]
    forward, input_grad, weight_grad = (sum(getattr(work, name) for work in works) for name in _PASSES)
    again = _sum_recomputed(works, layout)
    comm = _tensor_comm_s(model, size=size, layout=layout, runtime=runtime, topology=topology)
    comm += _expert_comm_s(model, size=size, layout=layout, topology=topology)
    around = context_time(model, size=size, layout=layout, topology=topology, beside=weight_grad)
    hidden = _hidden_comm_s(comm, weight_grad, runtime)
    # Only full rematerialization runs the collectives of the forward again.
    again += comm + around.forward if layout.remat == "full" else 0.0
    input_grad += comm - hidden + around.backward
    comm += around.forward
    # If the host launches kernels more slowly than the device runs them, the device waits, in each pass as a whole.
    passes = 3 if layout.remat == "full" else 2
    waiting = max(0.0, passes * runtime.host_layer_s - (again + input_grad + weight_grad))
    # Of its gaps a third is the forward's, as of its kernels.
    waiting += 2 / 3 * runtime.host_gap_s
    return LayerTime(
        forward=max(forward + comm, runtime.host_layer_s) + runtime.host_gap_s / 3,
        recompute=again,
        input_grad=input_grad + waiting / 2,
        weight_grad=weight_grad + waiting / 2,
        # The forward and the backward wait for the same collectives, the recomputation for them once more.
        exposed=(3 if layout.remat == "full" else 2) * comm - around.forward + around.backward - hidden,
    )


def _time_operation(operation: Operation, accelerator: Accelerator, runtime: Runtime, dtype: str) -> _Work:
    """Return the seconds of one operation by pass.

    The backward of a product of two activations, as in the core of attention, is all input gradient: only a product
    with parameters has a weight gradient.
    """
    if isinstance(operation, Flash):
        more: dict[str, Any] = {"kernel": runtime.flash, "dtype": dtype}
        # The backward has five products for the forward's two (Dao et al. 2022, algorithm 4).
        return _Work(
            part="core",
            forward=flash_time_s(accelerator, flops=operation.flops, direction="forward", **more),
            input_grad=flash_time_s(accelerator, flops=2.5 * operation.flops, direction="backward", **more),
        )
    if not isinstance(operation, Product):
        forward, backward = (
            memory_time_s(accelerator, num_bytes=count) for count in (operation.forward_bytes, operation.backward_bytes)
        )
        if operation.part == "weights":
            return _Work(part="weights", forward=forward, input_grad=0.0, weight_grad=backward)
        return _Work(part=operation.part, forward=forward, input_grad=backward)
    # y[m, n] = x[m, k] w[k, n]; dx[m, k] = dy w^T sums over n, and dw[k, n] = x^T dy over m.
    m, n, k, batch = operation.m, operation.n, operation.k, operation.batch
    if operation.part == "weights":
        dtype = runtime.product_format.dtype or dtype
    summed = 0.0
    if operation.part == "weights" and runtime.gradient_sums == "in-product":
        summed = runtime.sum_traffic_bytes * batch * n * k
    forward, left, right = (
        matmul_time_s(accelerator, m=rows, n=columns, k=inner, batch=batch, dtype=dtype, more_bytes=more)
        for rows, columns, inner, more in ((m, n, k, 0.0), (m, k, n, 0.0), (k, n, m, summed))
    )
    if operation.part == "core":
        return _Work(part="core", forward=forward, input_grad=left + right)
    if operation.part == "weights" and runtime.adapter_rank:
        return _Work(part="weights", forward=forward, input_grad=left)
    return _Work(part=operation.part, forward=forward, input_grad=left, weight_grad=right)


def _sum_recomputed(works: Iterable[_Work], layout: Layout) -> float:
    """Return the seconds of the operations that the layout's rematerialization runs again in the backward."""
    parts: dict[str, tuple[Part, ...]] = {
        "none": (),
        "selective": ("core",),
        "dots": ("vector",),
        "full": ("core", "vector", "weights", "adapters"),
    }
    return sum(work.forward for work in works if work.part in parts[layout.remat])


def _tensor_comm_s(
    model: ModelConfig, *, size: LayerSize, layout: Layout, runtime: Runtime, topology: Topology
) -> float:
    """Return the seconds of one pass's collectives: two all-reduces, or two all-gathers and two reduce-scatters."""
    group = make_group(topology, size=layout.tensor, stride=1)
    # With latents one of the four in both passes is of these alone.
    width = (3 * model.hidden_size + attention_widths(model).entered) / 4
    numbers, item = size.sequences * size.queries * width, item_bytes(model)
    if runtime.sequence_parallel == "off":
        sent: dict[CollectiveKind, float] = {"all_reduce": item}
    else:
        # Cast activations are gathered for a product; sums are in 16 bits.
        is_cast = runtime.gathers == "cast" and runtime.product_format.is_narrow
        sent = {"all_gather": runtime.product_format.item_bytes if is_cast else item, "reduce_scatter": item}
    return 2 * sum(
        collective_time_s(kind, num_bytes=each * numbers, group=group, topology=topology) for kind, each in sent.items()
    )


def _expert_comm_s(model: ModelConfig, *, size: LayerSize, layout: Layout, topology: Topology) -> float:
    """Return the seconds of one pass's all-to-all over expert, of the rows there and of their results back."""
    if layout.expert == 1 or not model.num_experts:
        return 0.0
    group = make_group(topology, size=layout.expert, stride=layout.expert_stride)
    rows = model.num_experts * model.expert_rows(max(1, round(size.sequences * size.queries)))
    num_bytes = rows * model.hidden_size * item_bytes(model)
    return 2 * collective_time_s("all_to_all", num_bytes=num_bytes, group=group, topology=topology)


def _hidden_comm_s(comm: float, weight_grad: float, runtime: Runtime) -> float:
    """Return the seconds of a backward's collectives that the weight gradient hides.

    With sequence parallelism half of them, the all-gathers of the gradient, come before both products and stay exposed.
    """
    if runtime.tensor_overlap == "off":
        return 0.0
    return min(comm / 2 if runtime.sequence_parallel == "on" else comm, weight_grad)
