"""Compare with transformers itself, where the extra `hf` is installed: random models of every architecture, both ways.

Tolerances as in test_read.py. transformers runs on torch, on the CPU, in float32.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from trellax.commands.cli import main
from trellax.hub.config import hub_model, read_hub_model
from trellax.hub.tokenizer import load_tokenizer
from trellax.layers.rope.frequencies import rope_frequencies
from trellax.layers.rope.magnitude import rope_magnitude

from ..commands.crafted import add_tokenizer
from .hf_doubles import DOUBLES, make, tensors_of
from .hub import CASES, EXPERTS, GOLDEN, MODELS, wrong_by
from .make_hf_goldens import answer, build, save
from .quantized import write_quantized

pytest.importorskip("transformers", reason="needs the extra `hf`: torch and transformers")
pytest.importorskip("torch", reason="needs the extra `hf`: torch and transformers")

# What other people's libraries warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-4
QUICK = ("tensor=2", "tensor=2,pipe=2", "tensor=2,expert=2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """Return a maker of folders, each a model as transformers saves it, with the logits it has."""
    made: dict[str, Any] = {}

    def make(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[name] = folder, save(name, folder)
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "mesh"), [case if case[1] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_logits_are_those_of_transformers(name: str, mesh: str, saved: Callable[[str], Any]) -> None:
    folder, logits = saved(name)
    assert wrong_by(folder, mesh, logits) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_same_logits_after_import_and_export(
    name: str, saved: Callable[[str], Any], tmp_path: Path
) -> None:
    folder, logits = saved(name)
    words = ["--mesh", "tensor=2,pipe=2"]
    assert main(["import-hf", str(folder), str(tmp_path / "run"), *words]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back"), *words]) == 0
    assert np.array_equal(answer(tmp_path / "back"), logits)
    assert read_hub_model(tmp_path / "back").config == read_hub_model(folder).config


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_transformers_saves_stacked_are_read(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "model", save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors_of(tmp_path / "model"))
    assert wrong_by(tmp_path / "model", "tensor=2,expert=2", answer(tmp_path / "model")) < TOLERANCE


def test_experts_in_four_bits_are_those_of_transformers_and_are_exported_in_sixteen(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "model")
    logits = answer(tmp_path / "model")
    assert wrong_by(tmp_path / "model", "tensor=2,expert=2", logits) < TOLERANCE
    assert main(["import-hf", str(tmp_path / "model"), str(tmp_path / "run")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    back = tensors_of(tmp_path / "back")
    assert all(np.array_equal(back[name].view(np.uint16), leaf.view(np.uint16)) for name, leaf in expected.items())
    assert np.array_equal(answer(tmp_path / "back"), logits)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("name", [name for name, double in DOUBLES.items() if not double.is_ours])
def test_source_that_transformers_prefers_is_used(name: str, tmp_path: Path) -> None:
    folder = make(DOUBLES[name], tmp_path / "model", how=DOUBLES[name].twice)
    logits = answer(folder)
    assert wrong_by(folder, "data=1", logits) < TOLERANCE
    assert main(["import-hf", str(folder), str(tmp_path / "run")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert np.abs(answer(tmp_path / "back") - logits).max() < TOLERANCE


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": YARN,
    "other turns": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "rope_theta": 1e6},
    "two mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "attention_factor": YARN | {"attention_factor": 1.3, "mscale": 0.707, "mscale_all_dim": 1.0},
    "ends between pairs": YARN | {"truncate": False, "rope_theta": 150_000.0, "factor": 32.0},
    "one pair": YARN | {"original_max_position_embeddings": 6},
    "no pair": YARN | {"original_max_position_embeddings": 1},
    "llama3": YARN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "glm4_moe"])
def test_frequencies_are_those_of_transformers(kind: str, name: str) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = {"llama": {"head_dim": 128}, "deepseek_v3": {"qk_rope_head_dim": 64}, "glm4_moe": {"head_dim": 128}}[kind]
    values = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64} | own
    values |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 163_840}
    scaling = dict(SCALINGS[name]) | ({"partial_rotary_factor": 0.5} if kind == "glm4_moe" else {})
    config = hub_model({"model_type": kind, **values, "rope_parameters": scaling}).config
    theirs = AutoConfig.for_model(kind, **values, rope_parameters=dict(scaling))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    np.testing.assert_allclose(rope_frequencies(config), frequencies.numpy(), rtol=1e-6)
    assert rope_magnitude(config) == magnitude


@pytest.mark.parametrize("num_tokens", [4096, 4097])
@pytest.mark.parametrize("factor", [{}, {"factor": 8.0}, {"attention_factor": 1.3}])
def test_frequencies_by_length_are_those_of_transformers(factor: dict[str, float], num_tokens: int) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131_072, "pad_token_id": 0}
    values |= {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_key_value_heads": 4}
    factors = np.linspace(1, 60, 6).tolist()
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": factors, "rope_theta": 1e4}
    scaling |= factor | {"partial_rotary_factor": 0.75}
    config = hub_model({"model_type": "phi3", **values, "rope_parameters": scaling}).config
    theirs = AutoConfig.for_model("phi3", **values, rope_parameters=dict(scaling))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=num_tokens)
    np.testing.assert_allclose(rope_frequencies(config, num_tokens=num_tokens), frequencies.numpy(), rtol=1e-6)
    assert rope_magnitude(config) == magnitude


TEXTS = ("AB", "", "A!", "!")
SAID: dict[str, dict[str, Any]] = {
    "tokenizer_config alone": {"special_tokens_map.json": {}},
    "two eos_tokens": {"special_tokens_map.json": {"eos_token": "%"}},
    "add_bos_token without a template": {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "!"}},
    "two eos_token_ids": {"generation_config.json": {"eos_token_id": [5, 7]}, "config.json": {"eos_token_id": 9}},
    "no generation_config": {"generation_config.json": None, "config.json": {"eos_token_id": 9}},
}


@pytest.mark.parametrize("template", [None, "! $A", "! $A %"])
@pytest.mark.parametrize("name", SAID)
def test_texts_begin_and_end_as_those_of_transformers(name: str, template: str | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(GOLDEN / "llama3", folder := tmp_path / "model")
    add_tokenizer(folder)
    ours: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours.add_special_tokens(["!", "%"])
    if template:
        ours.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("!", 1), ("%", 5)])
    ours.save(str(folder / "tokenizer.json"))
    for file, values in SAID[name].items():
        before = json.loads((folder / file).read_text())
        (folder / file).unlink() if values is None else (folder / file).write_text(json.dumps(before | values))
    found, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        # What a template puts behind a text would end it before it goes on.
        expected = theirs(text)["input_ids"]
        assert found.encode_prompt(text) == (expected[:-1] if template and template.endswith("%") else expected)
    assert found.special.end_id == theirs.eos_token_id
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert list(found.special.stop_ids) == (ends if isinstance(ends, list) else [ends])
