"""Search for an inference layout: the latency of one request, or the throughput of many.

The stages of a pipeline work on different groups of requests in turn, so it is busy only with as many groups as stages.
Read `costs/inference_time.py` for the times, `plan.py` for the result.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..layers import ModelConfig, flops_per_token, param_counts
from ..meshes.arguments import check_choice, check_count
from ..meshes.errors import PlanError
from .costs.device_params import words_of_part
from .costs.inference_time import InferenceTime, Server, inference_time, trellax_server
from .costs.layout import Layout
from .costs.memory_model import MemoryUse
from .costs.serving.held import kv_bytes_per_token, layers_of_device, weight_bytes
from .explanations import explain_plans
from .legal_layouts import device_counts, legal_meshes
from .machines.topology import Topology
from .plan import Plan
from .training_search import MEMORY_RESERVE

_TOP = 5
_GB = 1e9
_MOST_REQUESTS = 4096
# Requests for which the cache of one is computed.
_SAMPLE = 64


@dataclass(frozen=True, kw_only=True)
class ServeQuestion:
    """A model to serve on a machine: `requests` at a time, each with `prompt` tokens and `generated` new ones.

    The model is priced in 16 bit, whatever its `dtype`: activations and cache in bfloat16, weights as `server` says.

    Args:
        requests: number of requests served at a time; 0 for as many as the memory of a layout holds, up to 4,096.
        prompt, generated: tokens of each request.
        server: traits of the inference server, by default of trellax's own.

    Raises:
        PlanError: fewer than one token, or a negative number of requests.
    """

    model: ModelConfig
    topology: Topology
    requests: int = 0
    prompt: int = 512
    generated: int = 128
    server: Server = field(default_factory=trellax_server)

    def __post_init__(self) -> None:
        for name, least in (("requests", 0), ("prompt", 1), ("generated", 1)):
            check_count(name, getattr(self, name), error=PlanError, least=least)

    @cached_property
    def served_model(self) -> ModelConfig:
        """The model in bfloat16, which is the one that is priced."""
        return replace(self.model, dtype="bfloat16")

    @property
    def memory_limit(self) -> float:
        """Bytes of each device that a plan can use."""
        return (1 - MEMORY_RESERVE) * self.topology.accelerator.memory_bytes


def search_serving(question: ServeQuestion, *, objective: str, top: int = _TOP) -> list[Plan]:
    """Return the best plans, best first, each with the reason for its rank.

    Args:
        objective: "latency" of one request alone, "throughput" of all together in tokens per second, "memory" of the
            fullest device, or "balanced" between latency and throughput; see `balance_plans`.
        top: number of plans.

    Raises:
        PlanError: nothing fits (the message says what would), or the objective is unknown.
    """
    check_choice("objective", objective, ("latency", "throughput", "memory", "balanced"), error=PlanError)
    check_count("top", top, error=PlanError)
    return rank_serving(price_all_serving(question, objective=objective), objective=objective, top=top)


def rank_serving(plans: Iterable[Plan], *, objective: str, top: int = _TOP) -> list[Plan]:
    """Return the best of the plans of `price_all_serving` as `search_serving` does."""
    if objective == "balanced":
        return explain_plans(balance_plans(plans)[:top], objective="balanced")
    return explain_plans(sorted(plans, key=lambda plan: _rank(plan, objective))[:top], objective=objective)


def price_all_serving(question: ServeQuestion, *, objective: str) -> list[Plan]:
    """Return the plan of every mesh that fits, unsorted.

    For "latency" a plan serves one request alone; for "balanced" it has the latency of one alone and the throughput of
    all.

    Raises:
        PlanError: nothing fits; the message says what would.
    """
    asked = replace(question, requests=1) if objective == "latency" else question
    plans = [plan for plan in _price_all(asked) if plan.memory.total <= asked.memory_limit]
    if not plans:
        raise _nothing_fits(asked)
    return [_with_latency_alone(asked, plan) for plan in plans] if objective == "balanced" else plans


def balance_plans(plans: Iterable[Plan]) -> list[Plan]:
    """Return the Pareto front of latency and throughput, nearest to the ideal point of both first.

    Latency is that of one request alone, throughput that of a full machine. Distances are logarithms, each divided by
    its range on the front, so that a factor counts the same everywhere.
    """
    both = [(plan, plan.inference.latency_s, plan.tokens_per_s) for plan in plans if plan.inference]
    front = [
        (plan, math.log(latency), -math.log(pace))
        for plan, latency, pace in both
        if not any(a <= latency and b >= pace and (a, b) != (latency, pace) for _, a, b in both)
    ]
    latencies, paces = [latency for _, latency, _ in front], [pace for _, _, pace in front]

    def distance(point: tuple[Plan, float, float]) -> float:
        _, latency, pace = point
        return math.hypot(_position(latency, latencies), _position(pace, paces))

    return [plan for plan, *_ in sorted(front, key=distance)]


def serving_memory(question: ServeQuestion, layout: Layout) -> MemoryUse:
    """Return the memory of the fullest device: weights, the key-value cache of all its requests, and activations."""
    model = question.served_model
    held = question.server.held
    requests = math.ceil(question.requests / layout.data)
    tokens = requests * (question.prompt + question.generated)
    cache = tokens * layers_of_device(model, layout=layout, held=held)
    cache *= kv_bytes_per_token(model, tensor=layout.tensor, held=held)
    # Elements of 16 bit for each token being read: the residual stream with its norms and branches, the feed-forward
    # part, and float32 logits (two elements each) of an eighth of the tokens.
    words = words_of_part(model, parts=layout.tensor)
    width = 4 * model.hidden_size + 3 * model.ffn_size / layout.tensor + 2 * words / 8
    return MemoryUse(
        weights=weight_bytes(model, layout=layout, held=held),
        gradients=0.0,
        optimizer=0.0,
        activations=2.0 * min(held.read_tokens, requests * question.prompt) * width,
        temporary=0.0,
        kv_cache=cache,
    )


def most_requests(question: ServeQuestion, layout: Layout) -> int:
    """Return the number of requests at a time that the caches of a layout hold, from 1 to 4,096."""
    many = serving_memory(replace(question, requests=_SAMPLE * layout.data), layout)
    # From _SAMPLE requests on only the cache grows, for prompts of 64 tokens or more: activations are at their limit.
    free = question.memory_limit - (many.total - many.kv_cache)
    return max(1, min(_MOST_REQUESTS, layout.data * int(max(0.0, free) * _SAMPLE / many.kv_cache)))


def price_serving(question: ServeQuestion, layout: Layout) -> Plan:
    """Return the plan of one inference layout, whether or not it fits."""
    if not question.requests:
        question = replace(question, requests=most_requests(question, layout))
    model, topology = question.served_model, question.topology
    batch = math.ceil(question.requests / layout.data)
    timing = inference_time(
        model,
        layout=layout,
        topology=topology,
        batch=batch,
        prompt=question.prompt,
        generated=question.generated,
        server=question.server,
    )
    # `batch` was rounded up to the same number for each copy of the model; only the requests asked for count.
    timing = replace(timing, tokens_per_s=timing.tokens_per_s * question.requests / (batch * layout.data))
    return Plan(
        layout=layout,
        memory=serving_memory(question, layout),
        traffic_bytes=_decode_traffic(model, layout=layout, batch=math.ceil(batch / layout.pipe)),
        costs=_costs(question, layout, timing),
        inference=timing,
        mfu=_mfu(question, timing.tokens_per_s),
        device_watts=topology.accelerator.watts,
        bubble_fraction=1 - min(1.0, batch / layout.pipe),
    )


def _price_all(question: ServeQuestion) -> Iterable[Plan]:
    """Yield the plan of every mesh that the model splits over, without more copies of it than requests."""
    for count in device_counts(question.topology):
        for mesh in legal_meshes(question.served_model, num_devices=count):
            for expert in _splits_of_experts(question.served_model, mesh.data):
                # Shards that share experts are one copy of them.
                if mesh.data // expert <= (question.requests or mesh.data):
                    sizes = {"data": mesh.data, "tensor": mesh.tensor, "pipe": mesh.pipe, "expert": expert}
                    yield price_serving(question, Layout(**sizes))


def _splits_of_experts(model: ModelConfig, data: int) -> list[int]:
    """Return over how many of the data shards the experts of a model may be split."""
    return [
        e
        for e in range(1, data + 1)
        if data % e == 0 and (e == 1 or (model.num_experts and model.num_experts % e == 0))
    ]


def _position(value: float, values: Sequence[float]) -> float:
    """Return the position of a value between the least and the largest, from 0 to 1."""
    return (value - min(values)) / max(max(values) - min(values), 1e-9)


def _with_latency_alone(question: ServeQuestion, full: Plan) -> Plan:
    """Return the plan of a full machine with the times of one request alone."""
    alone = price_serving(replace(question, requests=1), replace(full.layout, data=full.layout.expert))
    assert full.inference is not None
    assert alone.inference is not None
    timing = replace(alone.inference, tokens_per_s=full.inference.tokens_per_s)
    return replace(full, inference=timing)


def _rank(plan: Plan, objective: str) -> tuple[float, ...]:
    assert plan.inference is not None
    first = {
        "latency": plan.inference.latency_s,
        "throughput": 1 / plan.inference.tokens_per_s,
        "memory": plan.memory.total,
    }[objective]
    return (first, plan.layout.num_devices)


def _costs(question: ServeQuestion, layout: Layout, timing: InferenceTime) -> dict[str, float]:
    """Return the seconds of a request by purpose.

    Communication is the difference to one node with links of unlimited bandwidth. Such links still need the time to
    start a message, which counts as reading: for messages of a few KB it is all of their time.
    """
    fast = replace(question.topology.accelerator, link_bytes_per_s=1e18, network_bytes_per_s=1e18, curve="")
    free = inference_time(
        question.served_model,
        layout=layout,
        topology=replace(question.topology, accelerator=fast, devices_per_node=layout.num_devices),
        batch=math.ceil(question.requests / layout.data),
        prompt=question.prompt,
        generated=question.generated,
        server=replace(question.server, all_reduce="nccl"),
    )
    sent = max(0.0, timing.latency_s - free.latency_s)
    return {
        "communication": sent,
        "reading prompts": timing.prefill_s,
        "reading weights and cache": timing.latency_s - timing.prefill_s - sent,
    }


def _decode_traffic(model: ModelConfig, *, layout: Layout, batch: int) -> dict[str, float]:
    """Return the bytes that a device sends for one token of each request of a group."""
    message, t = 2.0 * batch * model.hidden_size, layout.tensor
    layers = math.ceil(model.num_layers / layout.pipe)
    found = {"tensor": 2 * layers * 2 * (t - 1) / t * message, "pipe": message if layout.pipe > 1 else 0.0}
    if model.num_experts:
        found["expert"] = 2 * (layers - model.dense_layers / layout.pipe) * (layout.expert - 1) * message
    return {axis: sent for axis, sent in found.items() if sent}


def _mfu(question: ServeQuestion, tokens_per_s: float) -> float:
    """Return the flops of prompts and generated tokens over the machine's peak."""
    whole = question.prompt + question.generated
    flops = flops_per_token(question.served_model, num_tokens=whole).forward * whole / question.generated
    peak = question.topology.accelerator.peak_flops_per_s("bfloat16") * question.topology.num_devices
    return tokens_per_s * flops / peak


def _nothing_fits(question: ServeQuestion) -> PlanError:
    topology, model = question.topology, question.served_model
    plans = list(_price_all(question))
    asked = f"{param_counts(model).total / _GB:.1f} billion parameters on {topology.name}"
    if not plans:
        return PlanError(f"no layout of {asked}: heads and features split over no mesh.", fix="change the devices.")
    least = min(plans, key=lambda plan: plan.memory.total)
    without = least.memory.total - least.memory.kv_cache
    count = topology.num_devices * math.ceil(least.memory.total / question.memory_limit)
    fixes = [f"use {count} or more devices"]
    fewer = int(question.requests * (question.memory_limit - without) / least.memory.kv_cache)
    if 0 < fewer < question.requests:
        fixes.append(f"serve {fewer} requests at a time or fewer")
    return PlanError(
        f"nothing fits: {asked} needs at least {least.memory.total / _GB:.1f} GB a device "
        f"({least.memory.weights / _GB:.1f} weights, {least.memory.kv_cache / _GB:.1f} cache), and "
        f"{question.memory_limit / _GB:.1f} GB may be used.",
        fix=", or ".join(fixes) + ".",
    )
