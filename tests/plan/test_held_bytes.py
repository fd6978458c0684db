"""The planner counts the weights that devices hold: padding of the vocabulary, and kernels of four bits with scales."""

from dataclasses import replace
from typing import Any, get_args

import jax
import pytest
from trellax.layers import ModelConfig, model_rules
from trellax.meshes import MeshSpec, ShardingRules, build_mesh
from trellax.pipeline import split_transformer
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import step_memory
from trellax.plan.costs.runtime import trellax_runtime
from trellax.plan.machines.topology import read_topology
from trellax.programs.memory import device_bytes
from trellax.schedules import Vocab

SIZES: dict[str, Any] = {"vocab_size": 257, "num_layers": 4, "hidden_size": 128, "num_heads": 4, "max_tokens": 64}
LORA: dict[str, Any] = {"lora_rank": 8, "dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {"all trained": {}, "adapters": LORA, "four bits": LORA | {"lora_base": "nf4"}}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mesh", ["tensor=2,pipe=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tensor=4", "pipe=4"))]
)
@pytest.mark.parametrize("vocab", get_args(Vocab))
def test_weights_are_those_of_the_arrays(name: str, mesh: str, vocab: Vocab) -> None:
    spec = MeshSpec.parse(mesh)
    # Tied, so that with tables at the ends the program's arrays are those that a rank uses.
    model = ModelConfig(**SIZES | MODELS[name], embeddings="tied", bias="off", norm="rmsnorm", positions="rotary")
    there = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    cut = split_transformer(model, mesh=there, vocab=vocab, rules=model_rules(model, there.shape))
    layout = Layout(data=1, tensor=spec.tensor, pipe=spec.pipe, microbatches=4)
    runtime = trellax_runtime(model, read_topology("h100x8").accelerator, vocab=vocab)
    uses = step_memory(model, layout=layout, num_tokens=64, runtime=replace(runtime, workspace_bytes=0))
    # Norms are counted as wide as kernels: they are few.
    tolerance = 0 if name == "all trained" else 0.02
    assert max(use.weights for use in uses) == pytest.approx(device_bytes(cut.params), rel=tolerance)


@pytest.mark.parametrize("mesh", ["expert=2,tensor=2,pipe=2", pytest.param("tensor=4,pipe=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("targets", [(), ("attention.*", "experts.down", "head")], ids=["all", "some"])
def test_adapters_of_every_linear_layer_are_counted(targets: tuple[str, ...], mesh: str) -> None:
    """Those of experts, shared experts, dense layers, latent vectors and the head, on the fullest rank."""
    spec, sizes = MeshSpec.parse(mesh), SIZES | {"dense_layers": 1, "num_experts": 4, "experts_per_token": 2}
    sizes |= {"expert_size": 96, "shared_size": 64, "latent_size": 32, "query_latent_size": 24, "rope_head_size": 8}
    style: dict[str, Any] = {"bias": "off", "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu"}
    model = ModelConfig(**sizes, **style, embeddings="untied", lora_rank=8, lora_targets=targets)
    there = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    rules = model_rules(model, there.shape, rules=ShardingRules.of(spec.roles))
    cut = split_transformer(model, mesh=there, vocab="split", rules=rules)
    adapters = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cut.params) if "lora" in path[-1].key]
    layout = Layout(data=spec.expert, expert=spec.expert, tensor=spec.tensor, pipe=spec.pipe, microbatches=4)
    runtime = trellax_runtime(model, read_topology("h100x8").accelerator, vocab="split")
    uses = step_memory(model, layout=layout, num_tokens=64, runtime=runtime)
    assert max(use.optimizer for use in uses) == pytest.approx(2 * device_bytes(adapters))
