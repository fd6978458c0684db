"""Attention of the user's that sees only its own device's tokens is refused where devices share a sequence."""

from dataclasses import replace
from typing import Any

import jax
import pytest
from flax import nnx
from trellax.configs import load_config
from trellax.configs.check import check_run
from trellax.layers import ModelConfig, model_rules
from trellax.layers.own.over_context import check_over_context
from trellax.meshes import MeshSpec, ModelError, ShardingRules, TrellaxError, build_mesh
from trellax.pipeline import split_transformer

from ...pipeline import own_blocks

CONFIG = ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, num_heads=4, max_tokens=32)


class SentByHand(nnx.Module):
    """Attention that says that it sends tokens over context itself."""

    over_context = True

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        self.inner = own_blocks.ByHand(config, rngs=rngs, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.inner(x_BTD)


def named(name: str) -> str:
    return f"{__name__ if name == 'SentByHand' else own_blocks.__name__}:{name}"


def config_with(key: str, name: str) -> ModelConfig:
    dims = ("inner=tensor",) if name != "WindowAttention" else ()
    fields: dict[str, Any] = {key: named(name), "dims": dims}
    return replace(CONFIG, **fields)


@pytest.mark.parametrize(("key", "name"), [("attention_class", "ByHand"), ("block", "ByHand")])
def test_a_class_without_our_attention_is_refused_over_context(key: str, name: str) -> None:
    own = config_with(key, name)
    check_over_context(own, context=1)
    with pytest.raises(ModelError, match=f"{key}=.*{name}.*mesh.context=2: a device has 1/2 of each sequence"):
        check_over_context(own, context=2)


@pytest.mark.parametrize(
    ("key", "name"),
    [("attention_class", "WindowAttention"), ("attention_class", "SentByHand"), ("block", "ParallelBlock")],
)
def test_a_class_with_our_attention_or_that_sends_tokens_itself_is_not(key: str, name: str) -> None:
    check_over_context(config_with(key, name), context=4)


def test_a_model_is_refused_on_a_mesh_of_ones_own() -> None:
    spec, config = MeshSpec.parse("context=2"), config_with("attention_class", "ByHand")
    mesh = build_mesh(spec, devices=jax.devices()[:2])
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(spec.roles))
    with pytest.raises(ModelError, match="ByHand has no Attention of trellax"):
        split_transformer(config, mesh=mesh, rules=rules)


def test_a_run_is_refused_before_it_begins() -> None:
    words = ["--mesh.data", "1", "--mesh.tensor", "1", "--mesh.pipe", "1", "--mesh.context", "2"]
    own = ["--model.attention_class", named("ByHand"), "--model.dims", "inner=tensor"]
    with pytest.raises(TrellaxError, match="has no Attention of trellax"):
        check_run(load_config("tiny-dense", [*words, *own]), num_devices=2)
