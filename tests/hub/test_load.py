"""A folder's model as a `Transformer` that is called: the logits of transformers, on one device and on any mesh."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.configs import load_config
from trellax.hub import load_model, read_hub_model, read_model_config
from trellax.layers import Transformer
from trellax.meshes import MeshSpec, ModelError, build_mesh
from trellax.serve import Engine, Request, load_for_serving
from trellax.train.checkpoints.initial_weights import save_params

from .hub import GOLDEN, MODELS, tokens_of

TOLERANCE = 2e-4
"""As in test_read.py: float32 logits of about 5, added in another order."""


def mesh_of(text: str) -> jax.sharding.Mesh:
    spec = MeshSpec.parse(text)
    return build_mesh(spec, devices=jax.devices()[: spec.num_devices])


@pytest.mark.parametrize("mesh", [None, "tensor=2", "data=2,tensor=2,pipe=2"])
@pytest.mark.parametrize("name", ["llama32", "gpt2"])
def test_called_model_gives_the_logits_of_transformers(name: str, mesh: str | None) -> None:
    model = load_model(GOLDEN / name, mesh=mesh_of(mesh) if mesh else None, dtype="float32")
    found = np.asarray(model(jnp.asarray(tokens_of())))
    assert np.abs(found - np.load(GOLDEN / name / "logits.npy")).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_called_model_gives_the_logits_of_transformers_for_every_architecture(name: str) -> None:
    model = load_model(GOLDEN / name, mesh=mesh_of("tensor=2"), dtype="float32")
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens_of()))
    assert np.abs(found - np.load(GOLDEN / name / "logits.npy")).max() < TOLERANCE


def test_parameters_are_split_over_the_mesh_and_on_no_other_device() -> None:
    mesh = mesh_of("tensor=2")
    model = load_model(GOLDEN / "llama3", mesh=mesh)
    kernel = nnx.to_pure_dict(nnx.state(model, nnx.Param))["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, None, "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 16)}
    devices = {device for leaf in jax.tree.leaves(nnx.state(model)) for device in leaf.devices()}
    assert devices == set(mesh.devices.flat)


def test_experts_are_split_over_their_axis_and_routers_stay_in_float32() -> None:
    spec = MeshSpec.parse("tensor=2,expert=2")
    mesh = build_mesh(spec, devices=jax.devices()[:4])
    model = load_model(GOLDEN / "mixtral", mesh=mesh, axes=spec.roles, dtype="float32")
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens_of()))
    assert np.abs(found - np.load(GOLDEN / "mixtral" / "logits.npy")).max() < TOLERANCE
    rounded = load_model(GOLDEN / "mixtral", mesh=mesh, axes=spec.roles, dtype="bfloat16")
    layer = nnx.to_pure_dict(nnx.state(rounded, nnx.Param))["blocks"]["mlp"]
    assert layer["up"]["kernel"].sharding.spec == jax.P(None, "expert", None, "tensor")
    assert (layer["up"]["kernel"].dtype, layer["router"]["weight"].dtype) == (jnp.bfloat16, jnp.float32)


def test_model_of_a_run_continues_as_the_engine_does(tmp_path: Path) -> None:
    config = load_config("tiny-llama")
    drawn = Transformer(config.model, rngs=nnx.Rngs(3))
    params = jax.tree.map(lambda leaf: 10 * leaf, nnx.to_pure_dict(nnx.state(drawn, nnx.Param)))
    save_params(tmp_path, params, config)
    model, prompt = load_model(tmp_path), [5, 17, 99]
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(model(jnp.asarray([tokens]))[0, -1].argmax()))
    mesh = mesh_of("tensor=2,pipe=2")
    source, served = load_for_serving(tmp_path, mesh=mesh)
    engine = Engine(source.config, served, mesh=mesh, slots=2, max_tokens=16)
    (answer,) = engine.generate([Request(prompt=tuple(prompt), max_new_tokens=6)])
    assert tokens[3:] == list(answer.tokens)


def test_type_that_is_asked_for_is_that_of_parameters_and_computation() -> None:
    model = load_model(GOLDEN / "llama3", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    assert model.config.dtype == "bfloat16"


def test_model_that_does_not_split_over_the_mesh_is_refused_before_a_weight_is_read() -> None:
    with pytest.raises(ModelError, match="num_heads=4 does not split over tensor=8"):
        load_model(GOLDEN / "llama3", mesh=mesh_of("tensor=8"))


def test_config_of_a_hugging_face_folder_is_that_of_its_model() -> None:
    assert read_model_config(GOLDEN / "qwen3") == read_hub_model(GOLDEN / "qwen3").config
