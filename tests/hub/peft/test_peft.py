"""Compare with the package peft, where it is installed: it loads our adapters and we load its, with equal logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.hub import load_model
from trellax.hub.config import read_hub_model
from trellax.hub.peft.write import write_adapters
from trellax.meshes import MeshSpec, build_mesh

from ..hub import GOLDEN
from .test_adapters import BASE, Magnitude, random_adapters, written

peft = pytest.importorskip("peft", reason="needs peft, torch and transformers")
torch = pytest.importorskip("torch", reason="needs peft, torch and transformers")
transformers = pytest.importorskip("transformers", reason="needs peft, torch and transformers")

# What other people's libraries warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-4
"""As in test_transformers.py."""


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def tokens_of() -> np.ndarray:
    return np.arange(24)[None] ** 2 % 61


@pytest.mark.parametrize(("targets", "magnitude"), [((), "off"), (("query", "value"), "off"), ((), "on")])
def test_peft_loads_our_adapters_with_the_same_logits(
    targets: tuple[str, ...], magnitude: Magnitude, tmp_path: Path
) -> None:
    written(tmp_path / "out", *targets, magnitude=magnitude)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = logits_of(base, tokens_of())
    there = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval(), tokens_of())
    here = load_model(tmp_path / "out", dtype="float32")(jnp.asarray(tokens_of()))
    assert np.abs(there - plain).max() > 10 * TOLERANCE
    assert np.abs(there - here).max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gpt2"])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_we_load_adapters_of_peft_with_the_same_logits(name: str, variant: dict[str, bool], tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    modules = ["c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "o_proj", "down_proj"]
    modules += ["lm_head"] if name == "llama3" else []
    options = {"fan_in_fan_out": name == "gpt2", "init_lora_weights": False} | variant
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config)
    for leaf_name, leaf in model.named_parameters():
        if "lora_magnitude_vector" in leaf_name:
            # Fresh ones are the columns' lengths.
            leaf.data *= torch.linspace(0.5, 1.5, leaf.numel()).reshape(leaf.shape)
    model.save_pretrained(tmp_path / "out")
    here = load_model(tmp_path / "out", dtype="float32")(jnp.asarray(tokens_of()))
    assert np.abs(logits_of(model.eval(), tokens_of()) - here).max() < TOLERANCE


@pytest.mark.parametrize("mesh", ["data=1", "expert=2,tensor=2"])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mixtral", ("gate_up_proj", "down_proj")),
        ("qwen3_moe", ("down_proj", "gate_up_proj")),
        ("qwen3_moe", ("gate_up_proj",)),
        ("deepseek_v3", ("down_proj",)),
    ],
)
def test_we_load_adapters_of_a_parameter_of_all_experts_with_the_same_logits(
    name: str, parameters: tuple[str, ...], mesh: str, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    plain = logits_of(base, tokens_of())
    given = [f"mlp.experts.{parameter}" for parameter in parameters]
    options: dict[str, Any] = {"target_modules": ["o_proj"], "target_parameters": given, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "out")
    spec = MeshSpec.parse(mesh)
    where = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    here = load_model(tmp_path / "out", dtype="float32", mesh=where, axes=spec.roles)(jnp.asarray(tokens_of()))
    there = logits_of(model.eval(), tokens_of())
    assert np.abs(there - plain).max() > 10 * TOLERANCE
    assert np.abs(there - here).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama3", ("query", "head")),
        ("qwen3_moe", ()),
        ("mixtral", ()),
        ("deepseek_v2", ("attention.*", "mlp.experts.*")),
        ("deepseek_v3", ("query.*", "experts.down")),
    ],
)
def test_peft_loads_our_adapters_of_chosen_layers_with_the_same_logits(
    name: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    hub = read_hub_model(GOLDEN / name)
    config = replace(hub.config, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    adapters = random_adapters(config, GOLDEN / name)
    write_adapters(adapters, config, tmp_path / "out", base=str(GOLDEN / name), architecture=hub.architecture)
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    plain = logits_of(base, tokens_of())
    there = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval(), tokens_of())
    here = load_model(tmp_path / "out", dtype="float32")(jnp.asarray(tokens_of()))
    assert np.abs(there - plain).max() > 10 * TOLERANCE
    assert np.abs(there - here).max() < TOLERANCE
