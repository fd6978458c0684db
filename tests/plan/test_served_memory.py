"""A server's weights and cache, as the planner counts them, are those of the arrays that an engine makes."""

import jax
import pytest
from trellax.configs import load_config
from trellax.layers import ModelConfig, bytes_per_device
from trellax.meshes import MeshSpec, PlanError, build_mesh
from trellax.plan import Layout, ServeQuestion, read_topology, search_serving
from trellax.plan.costs.inference_time import trellax_server
from trellax.plan.machines.kernel_time import memory_time_s
from trellax.plan.serving_search import price_serving, serving_memory
from trellax.serve.params import stage_shapes
from trellax.serve.state import Sizes, state_shapes

DENSE, EXPERTS, LATENTS = "llama3-8b-8gpu", "qwen3-30b-a3b-8gpu", "deepseek-v2-lite-8gpu"
TOKENS = 4096

CASES = [
    (DENSE, "tensor=2,pipe=4", "int8", "fp8"),
    (LATENTS, "expert=2,pipe=2", "fp8", "fp8"),
]
MORE = [
    (DENSE, "pipe=8", "plain", "bfloat16"),
    (DENSE, "tensor=8", "fp8", "bfloat16"),
    (DENSE, "data=2,pipe=2", "int8", "bfloat16"),
    (EXPERTS, "expert=4,tensor=2", "plain", "fp8"),
    (EXPERTS, "data=2,tensor=2,pipe=2", "int8", "bfloat16"),
    (LATENTS, "pipe=4", "plain", "bfloat16"),
]


def model_of(name: str) -> ModelConfig:
    return load_config(name).model


def check(name: str, text: str, weights: str, cache: str) -> None:
    spec, model = MeshSpec.parse(text), model_of(name)
    mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    slots = spec.data * spec.pipe
    sizes = Sizes(slots=slots, max_tokens=TOKENS, groups=spec.pipe, num_shards=spec.data, chunk=64, items=1, rounds=1)
    cached = state_shapes(model, sizes, mesh=mesh, cache_dtype=cache, axes=spec.roles).cache  # type: ignore[arg-type]
    params = stage_shapes(model, mesh=mesh, axes=spec.roles, weights=weights)  # type: ignore[arg-type]
    question = ServeQuestion(
        model=model,
        topology=read_topology("h200x8"),
        requests=slots,
        prompt=TOKENS - 128,
        generated=128,
        server=trellax_server(weights=weights, cache_dtype=cache),
    )
    layout = Layout(data=spec.data, tensor=spec.tensor, pipe=spec.pipe, expert=spec.expert)
    found = serving_memory(question, layout)
    assert found.weights == pytest.approx(bytes_per_device(params), rel=0.005)
    assert found.kv_cache == pytest.approx(bytes_per_device(cached), rel=0.005)


@pytest.mark.parametrize(("name", "mesh", "weights", "cache"), CASES)
def test_bytes_are_those_of_an_engine(name: str, mesh: str, weights: str, cache: str) -> None:
    check(name, mesh, weights, cache)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "weights", "cache"), MORE)
def test_bytes_are_those_of_an_engine_on_more_meshes(name: str, mesh: str, weights: str, cache: str) -> None:
    check(name, mesh, weights, cache)


def test_eight_bits_are_smaller_and_faster_where_reading_takes_the_time() -> None:
    question = {"model": model_of(DENSE), "topology": read_topology("h200x1"), "requests": 1}
    plain = price_serving(ServeQuestion(**question, server=trellax_server()), Layout())
    narrow = price_serving(ServeQuestion(**question, server=trellax_server(weights="int8")), Layout())
    assert narrow.memory.weights < 0.57 * plain.memory.weights
    assert plain.inference is not None
    assert narrow.inference is not None
    # The launches of a layer's kernels stay.
    spared_s = plain.inference.decode_s - narrow.inference.decode_s
    spared_bytes = plain.memory.weights - narrow.memory.weights
    read_s = memory_time_s(question["topology"].accelerator, num_bytes=spared_bytes)
    assert spared_s == pytest.approx(read_s, rel=0.1)


def test_a_search_splits_experts_that_fit_no_device() -> None:
    question = ServeQuestion(model=model_of("qwen3-235b-a22b-64gpu"), topology=read_topology("h200x8"))
    plans = search_serving(question, objective="throughput", top=100)
    split = [plan for plan in plans if plan.layout.expert > 1]
    assert split
    assert all(plan.traffic_bytes["expert"] > 0 for plan in split)
    # All experts of a layer are read for each token: half as many in half the time.
    whole, half = (price_serving(question, Layout(data=2, tensor=4, expert=expert)) for expert in (1, 2))
    assert half.memory.weights < 0.55 * whole.memory.weights


def test_unknown_formats_are_told() -> None:
    with pytest.raises(PlanError, match="fp9"):
        trellax_server(weights="fp9")
