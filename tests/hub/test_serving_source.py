"""Hugging Face folders are served as they are: the tokens are those of transformers, on any mesh."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.hub import read as read_module
from trellax.hub.config import read_hub_model
from trellax.hub.model_folder import ModelSource, load_params
from trellax.hub.read import read_weights
from trellax.hub.text_stream import ByteTokenizer
from trellax.layers import bytes_per_device
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import Engine, Request, param_shapes, quantize_params
from trellax.serve.load import read_params

from .hub import GOLDEN, MODELS, build_longer, tokens_of

SAMPLE = [("llama3", "tensor=2,pipe=2"), ("gpt2", "data=1"), ("qwen3_moe", "tensor=2,pipe=2")]
SAMPLE += [("deepseek_v3", "tensor=2,pipe=2")]
MESHES = ["data=1", "tensor=2", "tensor=4", "pipe=2", "tensor=2,pipe=2", "data=2,tensor=2,pipe=2"]


def engine_of(folder: Path, mesh_text: str) -> Engine:
    spec = MeshSpec.parse(mesh_text)
    mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    config = read_hub_model(folder).config.__class__(**(vars(read_hub_model(folder).config) | {"dtype": "float32"}))
    params = read_weights(folder, param_shapes(config, mesh=mesh))
    assert bytes_per_device(param_shapes(config, mesh=mesh)) == sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards[:1]
    )
    return Engine(config, params, mesh=mesh, slots=8, chunk=8, fill="nan")


def check(name: str, mesh: str) -> None:
    """After every prefix of the golden texts the likeliest token of transformers' logits comes.

    Logits are of whole texts. LongRoPE turns all tokens of a text by its length, so shorter prefixes have others there.
    """
    logits_BTV, tokens_BT = np.load(GOLDEN / name / "logits.npy"), tokens_of()
    rows, length = tokens_BT.shape
    rope = read_hub_model(GOLDEN / name).config
    shortest = 1 + (rope.rope_original_tokens if rope.rope_scaling == "longrope" else 0)
    assert shortest < length
    places = [(row, end) for row in range(rows) for end in range(shortest, length + 1)]
    requests = [Request(prompt=tuple(tokens_BT[row, :end].tolist()), max_new_tokens=1) for row, end in places]
    found = [completion.tokens[0] for completion in engine_of(GOLDEN / name, mesh).generate(requests)]
    assert found == [int(logits_BTV[row, end - 1].argmax()) for row, end in places]


@pytest.mark.parametrize(("name", "mesh"), SAMPLE)
def test_next_token_is_that_of_transformers(name: str, mesh: str) -> None:
    check(name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_next_token_is_that_of_transformers_on_every_mesh(name: str, mesh: str) -> None:
    check(name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_64_tokens_are_those_that_transformers_generates(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    expected = build_longer(name, tmp_path, num_tokens=64, monkeypatch=monkeypatch)
    requests = [Request(prompt=tuple(row.tolist()), max_new_tokens=64) for row in tokens_of()]
    for mesh in MESHES:
        found = engine_of(tmp_path, mesh).generate(requests)
        assert [list(completion.tokens) for completion in found] == expected.tolist()


@pytest.mark.slow
def test_each_kernel_is_rounded_before_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mesh = GOLDEN / "llama3", build_mesh(MeshSpec(), devices=jax.devices()[:1])
    config, read = read_hub_model(folder).config, partial(load_params, folder)
    source = ModelSource(config=config, tokenizer=ByteTokenizer(), end_ids=(), read=read)
    whole, told = quantize_params(
        source.read(param_shapes(source.config, mesh=mesh)), config=source.config, mesh=mesh, weights="int8"
    )
    kernels: list[jax.Array] = []
    read_leaf = read_module._read_leaf

    def read_one(weights: Any, path: str, leaf: Any) -> jax.Array:
        assert all(one.is_deleted() for one in kernels)
        found = read_leaf(weights, path, leaf)
        kernels.extend([found] * path.endswith("kernel"))
        return found

    monkeypatch.setattr(read_module, "_read_leaf", read_one)
    params, error = read_params(source, mesh=mesh, weights="int8")
    assert error == told
    assert len(kernels) == 7
    assert jax.tree.all(jax.tree.map(np.array_equal, params, whole))
