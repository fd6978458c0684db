"""The whole model under plain `jax.jit` on any data x tensor mesh is the model on one device."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer, model_rules, param_dims
from trellax.meshes import DEFAULT_RULES, ModelError

from .sharded import STYLES, Collective, collectives, differing, draw_params, mesh_of, place, small_config, text_of

B, T = 8, 16
RNG = np.random.default_rng(0)
TOKENS, TARGETS = (RNG.integers(0, 64, (B, T)).astype(np.int32) for _ in range(2))
MASK = RNG.integers(0, 3, (B, T)).astype(np.float32)
BATCH = (TOKENS, TARGETS, MASK / MASK.sum())

CONFIGS = {
    "gpt": small_config("gpt", num_kv_heads=4),
    "llama": small_config("llama", num_kv_heads=2, embeddings="untied"),
}
CASES = [
    ("gpt", "tensor=2"),
    ("llama", "tensor=2"),
    ("llama", "data=2,tensor=4"),
    ("gpt", "data=4,tensor=2"),
    ("gpt", "tensor=8"),
    ("llama", "data=8"),
]
MISFITS: dict[str, tuple[dict[str, Any], int]] = {
    "heads": ({"num_heads": 4}, 8),
    "ffn": ({"ffn_size": 36}, 8),
    "kv_heads": ({"num_heads": 12, "num_kv_heads": 6, "hidden_size": 96, "ffn_size": 96}, 4),
}


class Program:
    """Loss and gradients of a config on a mesh, compiled, with parameters in place."""

    def __init__(self, config: ModelConfig, mesh: str, *, sequence: Literal["off", "on"] = "off") -> None:
        self.mesh = mesh_of(mesh)
        rules = model_rules(config, self.mesh.shape)
        rules = rules.split_stream() if sequence == "on" else rules
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
        graph = nnx.split(model)[0]
        self.params = place(draw_params(model), param_dims(model), mesh=self.mesh, rules=rules)
        self.batch = [place(leaf, ("batch", "tokens"), mesh=self.mesh) for leaf in BATCH]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        loss = jax.value_and_grad(lambda params, *batch: nnx.merge(graph, params).loss(*batch))
        with jax.set_mesh(self.mesh):
            step = jax.jit(loss, out_shardings=(None, shardings)).lower(self.params, *self.batch)
            self.compiled = step.compile()

    def answer(self) -> dict[str, Any]:
        loss, grads = self.compiled(self.params, *self.batch)
        return jax.device_get({"loss": loss, "grads": grads})

    def sent(self, where: str) -> list[Collective]:
        return [one for one in collectives(text_of(self.compiled)) if one.where == where]


@cache
def program(name: str, mesh: str = "tensor=1") -> Program:
    return Program(CONFIGS[name], mesh)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_loss_and_gradients_on_any_mesh_match_one_device(name: str, mesh: str) -> None:
    actual, expected = program(name, mesh).answer(), program(name).answer()
    assert abs(actual["loss"] - expected["loss"]) <= 2e-5 * abs(expected["loss"])
    assert differing(actual["grads"], expected["grads"]) == {}


def test_tokens_split_by_the_compiler_change_nothing() -> None:
    split, expected = Program(CONFIGS["llama"], "data=2,tensor=4", sequence="on"), program("llama").answer()
    actual = split.answer()
    assert abs(actual["loss"] - expected["loss"]) <= 2e-5 * abs(expected["loss"])
    assert differing(actual["grads"], expected["grads"]) == {}


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_says_its_dimensions(style: str) -> None:
    model = nnx.eval_shape(lambda: Transformer(small_config(style), rngs=nnx.Rngs(0)))
    shapes, dims = nnx.to_pure_dict(nnx.state(model, nnx.Param)), param_dims(model)
    ranks = jax.tree.map(len, dims, is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, shapes)
    assert set(jax.tree.leaves(dims)) <= set(dict(DEFAULT_RULES.table))


def test_parameters_are_initialized_split_the_same_on_any_mesh_and_never_whole() -> None:
    def draw() -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Transformer(CONFIGS["llama"], rngs=nnx.Rngs(0)), nnx.Param))

    params = program("llama", "tensor=2").params
    born = jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params)).lower().compile()
    # Equal but for the order of operations in a normal distribution's inverse.
    assert differing(jax.device_get(born()), jax.device_get(jax.jit(draw)()), tolerance=1e-6) == {}
    split = {leaf.shape for leaf in jax.tree.leaves(params) if any(leaf.sharding.spec)}
    found = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text_of(born))}
    assert not split & found
    assert {(64, 32), (2, 32, 128)} <= split


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_layer_sends_its_activation_four_times(name: str) -> None:
    # Twice forward and twice backward, the least that Megatron's split allows.
    found = program(name, "tensor=2").sent("loop")
    assert {(one.kind, one.shape) for one in found} == {("all-reduce", (B * T, 32))}
    assert len(found) == 4


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_rest_of_the_step_sends_rows_and_numbers_for_each_token(name: str) -> None:
    found = program(name, "tensor=2").sent("once")
    # Embedding forward, head backward; maximum, normaliser and target logit of the loss.
    assert sorted(one.shape for one in found) == [(B, T)] * 3 + [(B, T, 32)] * 2
    assert {one.kind for one in found} == {"all-reduce"}


@pytest.mark.parametrize("name", MISFITS)
def test_model_that_does_not_split_is_refused_with_the_equation(name: str, golden: Callable[[str, str], None]) -> None:
    changes, tensor = MISFITS[name]
    with pytest.raises(ModelError) as caught:
        model_rules(small_config(**changes), {"tensor": tensor})
    golden(f"errors/layers/model_rules_{name}.txt", str(caught.value))


@pytest.mark.parametrize(("num_kv_heads", "axes"), [(8, ("tensor",)), (4, ("tensor",)), (2, ()), (1, ())])
def test_key_value_heads_are_split_where_they_suffice_and_whole_where_not(
    num_kv_heads: int, axes: tuple[str, ...]
) -> None:
    assert model_rules(small_config(num_kv_heads=num_kv_heads), {"tensor": 4}).axes("kv_heads") == axes


def test_rules_without_a_tensor_axis_need_no_divisibility() -> None:
    rules = DEFAULT_RULES.replace(heads=None, kv_heads=None, ffn=None, vocab=None)
    assert model_rules(small_config(num_heads=4, vocab_size=65), {"tensor": 8}, rules=rules) == rules
