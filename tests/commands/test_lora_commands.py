"""Adapters on the command line: trained, exported beside and merged, trained further, and every mistake told."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from trellax.commands.cli import main
from trellax.train.metrics import read_metrics

from .test_hf_commands import TEXT, here

__all__ = ["here"]

LORA = f"{TEXT} --model.lora_rank 2 --model.lora_alpha 6 --model.lora_targets query,down --optimizer.learning_rate 0.05"


def tensors_of(folder: str) -> dict[str, np.ndarray]:
    return {name: leaf for file in Path(folder).glob("*.safetensors") for name, leaf in load_file(file).items()}


def test_adapters_are_trained_exported_merged_and_trained_further(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["import-hf", "model", "runs/mine"]) == 0
    tune = f"train runs/mine/config.toml --run.name tuned --train.init_from model {LORA}"
    assert main(f"{tune} --train.steps 3".split()) == 0
    assert main(["export-hf", "runs/tuned", "merged"]) == 0
    assert main(["export-hf", "runs/tuned", "adapters", "--adapters"]) == 0
    base, merged, own = map(tensors_of, ("model", "merged", "adapters"))
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in modules}
    for name in changed:
        a, b = (own[f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.weight"] for one in "AB")
        np.testing.assert_allclose(merged[name], base[name] + 6 / 2 * b @ a, atol=1e-6)
    # Another run goes on with the adapters as PEFT's files have them.
    capsys.readouterr()
    more = tune.replace("--run.name tuned --train.init_from model", "--run.name more --train.init_from adapters")
    assert main(f"{more} --optimizer.learning_rate 1e-30".split()) == 0
    losses = [read_metrics(f"runs/{name}")[-1]["val_loss"] for name in ("tuned", "more")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert main(f"{more.replace('lora_rank 2', 'lora_rank 4')} --run.name other".split()) == 2
    assert "has adapters of rank 2, and this config 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.lora_rank -1", "lora_rank=-1 is negative"),
        ("--model.lora_rank 2 --model.lora_targets querry", "Did you mean 'query'?"),
        ("--model.lora_alpha 2", "lora_rank=0: the model has no adapters"),
        ("--model.lora_rank 2 --train.init_from ''", "train.init_from does not say which"),
        ("--model.lora_rank 2 --optimizer.kind muon", "trains none of them"),
        ("--model.lora_rank 2 --train.offload optimizer", "too small to gain by it"),
    ],
)
def test_mistakes_are_told(words: str, message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-hf", "model", "runs/mine"])
    start = f"train runs/mine/config.toml --run.name tuned --train.init_from model {TEXT}"
    assert main([*shlex.split(start), *shlex.split(words)]) == 2
    assert message in capsys.readouterr().err


def test_run_without_adapters_has_none_to_export(here: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-hf", "model", "runs/mine"])
    assert main(["export-hf", "runs/mine", "adapters", "--adapters"]) == 2
    assert "it has no adapters" in capsys.readouterr().err


def test_describe_says_how_much_is_trained(here: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-hf", "model", "runs/mine"])
    capsys.readouterr()
    words = f"describe runs/mine/config.toml --train.init_from model {LORA}"
    main(words.replace("--mesh.data 8", "--mesh.data 2 --mesh.pipe 2 --mesh.tensor 2").split())
    out = capsys.readouterr().out
    assert "are trained: adapters of rank 2 on attention.query, mlp.down" in out


def test_planner_prices_adapters(here: Path, capsys: pytest.CaptureFixture) -> None:
    main(["import-hf", "model", "runs/mine"])
    capsys.readouterr()
    plans = []
    for words in (LORA, LORA.replace("lora_rank 2", "lora_rank 0").partition(" --model.lora_alpha")[0]):
        ask = f"plan runs/mine/config.toml {words} --topology h100x8 --this --json"
        assert main(ask.split()) == 0
        plans.append(json.loads(capsys.readouterr().out))
    gradients = [_find(told, "gradients") for told in plans]
    assert 0 < gradients[0] < 0.2 * gradients[1]


def _find(told: object, name: str) -> float:
    """Return the first number of this name in a tree."""
    if isinstance(told, dict):
        if isinstance(told.get(name), int | float):
            return float(told[name])
        found = [_find(own, name) for own in told.values()]
    else:
        found = [_find(own, name) for own in told] if isinstance(told, list) else []
    return next((value for value in found if value), 0.0)
