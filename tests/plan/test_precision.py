"""Narrow formats speed up products with weights alone, and cost casts; frozen weights have no gradient."""

from dataclasses import replace

import pytest
from trellax.layers import param_counts
from trellax.plan.costs.layer_time import layer_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.product_format import FORMATS
from trellax.plan.costs.runtime import ALL_ADAPTED, MEGATRON, Runtime, trellax_runtime
from trellax.plan.costs.stage_time import end_costs
from trellax.plan.diagnoses import diagnose
from trellax.plan.machines.kernel_time import matmul_time_s
from trellax.plan.machines.topology import read_topology
from trellax.plan.serving_search import ServeQuestion, price_serving
from trellax.plan.training_search import TrainQuestion, price_layout

from .models import GPT2

WIDE = replace(GPT2, dtype="bfloat16", hidden_size=8192, num_heads=64, num_kv_heads=64, ffn_size=32768, head_size=128)
MODERN = replace(MEGATRON, attention="fused", dropout="off")


def layer_of(runtime: Runtime, *, machine: str = "gb200x8"):
    sizes = {"layout": Layout(), "num_tokens": 4096, "topology": read_topology(machine)}
    return layer_time(WIDE, runtime=runtime, **sizes)


def test_each_narrower_format_makes_a_wide_layer_faster() -> None:
    times = []
    for name in ("plain", "mxfp8", "nvfp4"):
        layer = layer_of(replace(MODERN, products=name))
        times.append(layer.forward + layer.backward)
    assert times == sorted(times, reverse=True)
    # Never by more than the ratio of the peaks.
    assert times[0] / times[1] < 2
    assert times[0] / times[2] < 4


def test_a_pass_to_find_the_largest_value_costs_time() -> None:
    current, delayed = (layer_of(replace(MODERN, products=name)) for name in ("fp8-current", "fp8-delayed"))
    assert current.forward > delayed.forward
    assert current.weight_grad == delayed.weight_grad


def test_cast_reads_wide_numbers_once_and_writes_both_layouts() -> None:
    assert FORMATS["plain"].cast_bytes(2, layouts=2) == 0
    assert FORMATS["fp8-delayed"].cast_bytes(2, layouts=2) == 2 + 2 * 1
    assert FORMATS["fp8-current"].cast_bytes(2, layouts=1) == 2 + 2 + 1
    assert FORMATS["nvfp4"].cast_bytes(2, layouts=2) == 2 + 2 + 2 * (0.5 + 1 / 16)


def test_head_embedding_and_hops_stay_wide() -> None:
    sizes = {"layout": Layout(tensor=2, pipe=4, microbatches=8), "num_tokens": 4096}
    costs = [
        end_costs(WIDE, runtime=replace(MODERN, products=name), topology=read_topology("gb200x8"), **sizes)
        for name in ("plain", "nvfp4")
    ]
    assert costs[0] == costs[1]


def test_without_units_for_a_type_products_take_the_time_of_the_next_wider_one() -> None:
    a100, h100 = (read_topology(name).accelerator for name in ("a100", "h100"))
    sizes = {"m": 8192, "n": 8192, "k": 8192}
    assert a100.matmul_flops_per_s("float8") == a100.matmul_flops_per_s("bfloat16")
    assert h100.matmul_flops_per_s("float4") == h100.matmul_flops_per_s("float8")
    assert matmul_time_s(h100, dtype="float8", **sizes) < matmul_time_s(h100, dtype="bfloat16", **sizes)


def test_narrow_residuals_take_less_memory() -> None:
    layout = Layout(tensor=8, pipe=4, microbatches=8)
    held = [
        fullest(step_memory(WIDE, layout=layout, num_tokens=4096, runtime=replace(MODERN, products=name))).activations
        for name in ("plain", "mxfp8", "nvfp4")
    ]
    assert held == sorted(held, reverse=True)


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    adapters = replace(MODERN, adapter_rank=16, adapted=ALL_ADAPTED)
    layer, whole = layer_of(adapters), layer_of(MODERN)
    # What is left are the gradients of the adapters, 16 columns for 8,192.
    assert layer.weight_grad < 0.1 * whole.weight_grad
    assert layer.forward > whole.forward
    memory, everything = (
        fullest(step_memory(WIDE, layout=Layout(), num_tokens=4096, runtime=runtime)) for runtime in (adapters, MODERN)
    )
    d, layers = WIDE.hidden_size, WIDE.num_layers
    trained = layers * 16 * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d))
    assert memory.gradients == pytest.approx(2 * trained)
    assert memory.optimizer == pytest.approx(12 * trained)
    assert memory.weights == pytest.approx(everything.weights + 2 * trained)


def test_trellax_prices_its_own_adapters() -> None:
    model = replace(WIDE, lora_rank=8, lora_targets=("query", "down"))
    accelerator, counts = read_topology("h200x8").accelerator, param_counts(model)
    runtime = trellax_runtime(model, accelerator)
    assert (runtime.adapter_rank, runtime.adapted, runtime.weight_bytes) == (
        8,
        (("attention.query",), ("mlp.down",)),
        2,
    )
    memory = fullest(step_memory(model, layout=Layout(remat="dots"), num_tokens=4096, runtime=runtime))
    assert memory.gradients == pytest.approx(4 * counts.adapters)
    assert memory.optimizer == pytest.approx(8 * counts.adapters)
    # Frozen weights are read as they are kept: no cast copy of them is made.
    assert memory.weights < 1.01 * 2 * counts.total
    assert memory.temporary < 0.5 * memory.weights


def test_trellax_prices_its_own_fp8_by_current_scaling() -> None:
    accelerator = read_topology("h200x8").accelerator
    narrow = trellax_runtime(replace(WIDE, matmuls="fp8"), accelerator)
    assert (narrow.products, narrow.cast_layouts, narrow.weight_casts) == ("fp8-current", 1, "microbatch")
    assert trellax_runtime(WIDE, accelerator).products == "plain"


@pytest.mark.parametrize(
    ("machine", "expected"), [("h100x8", ["narrow-gain-not-seen"]), ("a100x8", ["no-narrow-units"])]
)
def test_plans_in_fp8_warn_where_the_device_has_no_units_for_it_and_that_no_gain_was_measured(
    machine: str, expected: list[str]
) -> None:
    model = replace(GPT2, dtype="bfloat16", matmuls="fp8")
    question = TrainQuestion(model=model, topology=read_topology(machine), batch_size=256, num_tokens=1024)
    plan = price_layout(question, Layout(data=8, microbatches=4, sequences=8, remat="dots"))
    assert [one.name for one in diagnose(question, plan) if one.severity != "note"] == expected


def test_serving_says_that_it_prices_fp8_as_bfloat16() -> None:
    model = replace(GPT2, dtype="bfloat16", matmuls="fp8")
    topology = read_topology("h100x8")
    question = TrainQuestion(model=model, topology=topology, batch_size=256, num_tokens=1024)
    plan = price_serving(ServeQuestion(model=model, topology=topology, requests=1), Layout())
    assert [one.name for one in diagnose(question, plan)] == ["priced-as-bfloat16"]
