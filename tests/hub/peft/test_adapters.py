"""Adapters go out to PEFT's files and come back, and what they add is W + (alpha / r) B A of the files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from trellax.hub import load_model
from trellax.hub.adapters import adapter_shapes, join_adapters, merge_adapters
from trellax.hub.config import read_hub_model
from trellax.hub.peft.names import adapted_layers, tensor_ends
from trellax.hub.peft.read import open_adapters, read_adapters
from trellax.hub.peft.write import tensors_of, write_adapters
from trellax.hub.read import read_weights
from trellax.layers import ModelConfig, Transformer
from trellax.layers.lora.linears import adapted_names
from trellax.meshes import WeightsError

from ..hub import GOLDEN, shapes_of

BASE, MIXED = GOLDEN / "llama3", GOLDEN / "deepseek_v3"


Magnitude = Literal["off", "on"]


def config_with(*targets: str, magnitude: Magnitude = "off") -> ModelConfig:
    own = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets, "lora_magnitude": magnitude}
    return replace(read_hub_model(BASE).config, **own)


def random_adapters(config: ModelConfig, base: Path = BASE) -> Any:
    shapes, rng = adapter_shapes(config, shapes_of(base)), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, jnp.float32), shapes)


def written(folder: Path, *targets: str, magnitude: Magnitude = "off") -> tuple[ModelConfig, Any]:
    config = config_with(*targets, magnitude=magnitude)
    adapters = random_adapters(config)
    write_adapters(adapters, config, folder, base=str(BASE))
    return config, adapters


@pytest.mark.parametrize(("targets", "magnitude"), [((), "off"), (("query", "down"), "off"), (("query", "down"), "on")])
def test_adapters_come_back_as_they_were(targets: tuple[str, ...], magnitude: Magnitude, tmp_path: Path) -> None:
    config, adapters = written(tmp_path / "out", *targets, magnitude=magnitude)
    opened = open_adapters(tmp_path / "out")
    there, found = read_adapters(opened, read_hub_model(BASE).config, shapes_of(BASE))
    assert (there.lora_rank, there.lora_alpha) == (config.lora_rank, config.lora_alpha)
    assert there.lora_magnitude == magnitude
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_merged_kernel_is_what_the_files_say(tmp_path: Path) -> None:
    config, adapters = written(tmp_path / "out", "query", "down")
    base = read_weights(BASE, shapes_of(BASE))
    kept = jax.tree.map(np.asarray, base)
    merged = merge_adapters(base, adapters, config=config)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for part, name, module in (("attention", "query", "self_attn.q_proj"), ("mlp", "down", "mlp.down_proj")):
        for layer in range(config.num_layers):
            a, b = (tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{m}.weight"] for m in "AB")
            wanted = kept["blocks"][part][name]["kernel"][layer].T + 6 / 3 * b @ a
            np.testing.assert_allclose(merged["blocks"][part][name]["kernel"][layer].T, wanted, atol=1e-6)
    assert np.array_equal(merged["blocks"]["mlp"]["up"]["kernel"], kept["blocks"]["mlp"]["up"]["kernel"])


def test_adapters_of_a_parameter_of_all_experts_are_those_of_each_expert(tmp_path: Path) -> None:
    """As `ParamWrapper` of PEFT 0.21 computes what they add: einsum("ore,eri->eoi") of A [E, r, i] and B [o, r, E]."""
    base, rng, rank = GOLDEN / "mixtral", np.random.default_rng(0), 3
    shapes, config = shapes_of(base), read_hub_model(base).config
    sizes = shapes["blocks"]["mlp"]["up"]["kernel"].shape
    num_layers, num_experts, d, f = sizes
    tensors, added = {}, {}
    for layer in range(num_layers):
        for nested, d_in, d_out in (("", f, d), (".base_layer", d, 2 * f)):
            a, b = rng.standard_normal((num_experts, rank, d_in)), rng.standard_normal((d_out, rank, num_experts))
            name = f"base_model.model.model.layers.{layer}.mlp.experts{nested}"
            tensors[f"{name}.lora_A.weight"] = a.reshape(-1, d_in).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = b.reshape(d_out, -1).astype(np.float32)
            added[layer, nested] = np.einsum("ore,eri->eio", b, a)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"target_parameters": ["experts.gate_up_proj"]}))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model, found = read_adapters(open_adapters(tmp_path), config, shapes)
    assert set(adapted_names(model)) == {"mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"}
    for layer in range(num_layers):
        wanted = {"gate": added[layer, ".base_layer"][..., :f], "up": added[layer, ".base_layer"][..., f:]}
        for name, own in (wanted | {"down": added[layer, ""]}).items():
            node = found["blocks"]["mlp"][name]
            product = np.einsum("eir,ero->eio", node["lora_a"][layer], node["lora_b"][layer])
            np.testing.assert_allclose(product, own, atol=1e-5)


@pytest.mark.parametrize("magnitude", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_model_with_merged_adapters_is_the_model_with_them_beside(magnitude: Magnitude) -> None:
    """Of all kinds of linear layers: attention from latent vectors, a dense layer, experts, shared ones, the head."""
    plain = read_hub_model(MIXED).config
    own: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": ("*", "head")}
    config = replace(plain, **own, lora_magnitude=magnitude)
    base, adapters = read_weights(MIXED, shapes_of(MIXED)), random_adapters(config, MIXED)
    tokens = jnp.arange(12)[None] % 61
    beside = with_params(config, join_adapters(base, adapters))(tokens)
    fresh = with_params(plain, base)(tokens)
    merged = with_params(plain, merge_adapters(base, adapters, config=config))(tokens)
    assert jnp.abs(merged - fresh).max() > 0.1
    np.testing.assert_allclose(merged, beside, atol=1e-4)


def with_params(config: ModelConfig, params: Any) -> Any:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    nnx.update(model, params)
    return model


@pytest.mark.parametrize("targets", [(), ("attention.*", "experts.down"), ("mlp.shared.up", "head")], ids=str)
def test_adapters_of_a_mixture_are_read_by_the_names_of_separate_modules(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    plain = read_hub_model(MIXED).config
    config = replace(plain, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    adapters = random_adapters(config, MIXED)
    layers = adapted_layers(config)
    tensors = tensors_of(adapters, layers, tensor_ends(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "base_model_name_or_path": str(MIXED)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    there, found = read_adapters(open_adapters(tmp_path), plain, shapes_of(MIXED))
    assert adapted_names(there) == adapted_names(config)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


@pytest.mark.parametrize(
    ("targets", "magnitude", "message"),
    [
        (("mlp.shared.*",), "off", "mlp.shared.down of a model with experts, whose names PEFT takes"),
        (("experts.up", "experts.gate"), "off", "mlp.experts.gate, mlp.experts.up alone"),
        (("experts.*",), "on", "mlp.experts.up with magnitudes"),
    ],
)
def test_adapters_that_peft_does_not_have_are_not_written(
    targets: tuple[str, ...], magnitude: Magnitude, message: str, tmp_path: Path
) -> None:
    plain = read_hub_model(MIXED).config
    config = replace(plain, lora_rank=3, lora_targets=targets, lora_magnitude=magnitude)
    with pytest.raises(WeightsError, match=message):
        write_adapters(random_adapters(config, MIXED), config, tmp_path / "out", base=str(MIXED))
    assert not (tmp_path / "out").exists()


def test_merged_columns_have_the_magnitudes_for_lengths(tmp_path: Path) -> None:
    config = config_with("query", "down", magnitude="on")
    adapters = random_adapters(config)
    merged = merge_adapters(read_weights(BASE, shapes_of(BASE)), adapters, config=config)
    for part, name in (("attention", "query"), ("mlp", "down")):
        lengths = np.linalg.norm(merged["blocks"][part][name]["kernel"], axis=1)
        np.testing.assert_allclose(lengths, np.abs(adapters["blocks"][part][name]["lora_m"]), rtol=1e-5)


def test_folder_of_peft_is_read_as_the_merged_model(tmp_path: Path) -> None:
    config, adapters = written(tmp_path / "out")
    merged = merge_adapters(read_weights(BASE, shapes_of(BASE)), adapters, config=config)
    found: Any = load_model(tmp_path / "out")
    kernel = found.blocks.mlp.up.kernel[...]
    assert np.array_equal(kernel, merged["blocks"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 0}, "r=0, not a whole number above 0"),
        ({"base_model_name_or_path": "org/model"}, "'org/model', and there is no such folder"),
    ],
)
def test_config_that_is_not_supported_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(WeightsError, match=message):
        open_adapters(tmp_path / "out")


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    written(tmp_path / "out", "query")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    save_file(tensors | {"more": first}, file)
    with pytest.raises(WeightsError) as caught:
        read_adapters(open_adapters(tmp_path / "out"), read_hub_model(BASE).config, shapes_of(BASE))
    assert "more is no adapter of a layer of this model" in str(caught.value)
    assert "layers.1.self_attn.q_proj.lora_A.weight is missing" in str(caught.value)
