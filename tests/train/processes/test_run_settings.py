"""Processes compare their settings before they join: all keys but paths, XLA flags, versions, options of jax."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from trellax.configs import RunConfig
from trellax.configs.run_config import config_keys
from trellax.meshes.processes.agreement import describe_differences
from trellax.train.processes.run_settings import collect_run_settings

Tiny = Callable[..., RunConfig]
PLACES = {"run.folder", "data.paths", "data.tokenizer", "train.init_from"}


def facts(config: RunConfig) -> dict[str, str]:
    return collect_run_settings(config, start="resume", changes="refuse")


def differences(one: dict[str, str], other: dict[str, str]) -> str:
    return describe_differences({0: one, 1: other})


def test_every_key_but_paths_is_compared(tiny: Tiny) -> None:
    assert set(config_keys()) - facts(tiny()).keys() == PLACES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", "0.5"),
        ("model.hidden_size", "128"),
        ("run.seed", "7"),
        ("checkpoint.every", "3"),
        ("train.steps", "77"),
        ("run.name", "other"),
    ],
)
def test_differing_value_is_reported_with_its_key(key: str, value: str, tiny: Tiny) -> None:
    told = differences(facts(tiny()), facts(tiny(f"--{key} {value}")))
    assert f"process 1 has {key}={value}, process 0 has " in told


def test_flags_of_the_command_line_are_compared(tiny: Tiny) -> None:
    fresh = collect_run_settings(tiny(), start="fresh", changes="refuse")
    assert differences(facts(tiny()), fresh) == "process 1 has --fresh=yes, process 0 has no"
    accepts = collect_run_settings(tiny(), start="resume", changes="accept")
    assert differences(facts(tiny()), accepts) == "process 1 has --override=yes, process 0 has no"


def test_versions_and_switches_are_compared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    here = facts(tiny())
    with jax.enable_x64(True):
        assert "process 1 has jax_enable_x64=True, process 0 has False" in differences(here, facts(tiny()))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "jax" else version(name))
    assert differences(here, facts(tiny())) == f"process 1 has jax=9.9, process 0 has {jax.__version__}"


def test_flags_of_xla_are_compared_in_any_order_and_without_dumps(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=2")
    here = facts(tiny())
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=2 --xla_dump_to=here --xla_b=1")
    assert differences(here, facts(tiny())) == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=3 --xla_b=1")
    assert differences(here, facts(tiny())) == (
        "process 1 has XLA_FLAGS=--xla_a=3 --xla_b=1, process 0 has --xla_a=2 --xla_b=1"
    )


def test_initial_weights_are_compared_by_content(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for name, byte in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(byte * 300_000)
        found.append(facts(tiny(f"--train.init_from {tmp_path / name}")))
    assert differences(found[0], found[1]) == ""
    assert "process 1 has weights of train.init_from=" in differences(found[0], found[2])
