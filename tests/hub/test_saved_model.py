"""The model in a save's record: read by itself, refused where its numbers cannot be trusted."""

from pathlib import Path
from typing import Any

import pytest
from trellax.hub.saved_model import read_saved_model
from trellax.hub.saves.seal import Seal
from trellax.layers import ModelConfig, param_counts
from trellax.meshes import CheckpointError

MODEL = ModelConfig(vocab_size=64, num_layers=2, hidden_size=16, num_heads=4)
FOLDER = Path("run/checkpoints/40")


def seal_of(model: dict[str, Any], *, num_params: int = param_counts(MODEL).total) -> Seal:
    arrays = {"params.all": ("float32", (num_params,), "0" * 16), "opt_state.mu": ("float32", (9,), "0" * 16)}
    return Seal(step=40, saved_at="", config={"model": model, "later": {"key": 1}}, data={}, arrays=arrays, files={})


def test_model_is_read_without_the_other_sections() -> None:
    assert read_saved_model(seal_of(vars(MODEL)), folder=FOLDER) == MODEL


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"soft_cap": 30.0}, r"was saved with model\.soft_cap, which this trellax does not know"),
    "wrong type": ({"num_layers": "2"}, r"cannot read: model: num_layers='2' is not a whole number"),
    "not finite": ({"rope_theta": float("inf")}, "cannot read: model: rope_theta=inf is not finite"),
    "other size": ({"num_layers": 3}, "was saved with the config of a model of .* parameters, and holds"),
    "endless": ({"num_layers": 10_000}, "was saved with the config of a model of .* parameters, and holds"),
    "list": ({"mlp": ["gelu"]}, r"cannot read: model: mlp=\['gelu'\] is not a choice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_model_is_refused(name: str) -> None:
    changes, text = WRONG[name]
    with pytest.raises(CheckpointError, match=f"^run/checkpoints/40 .*{text}"):
        read_saved_model(seal_of(vars(MODEL) | changes), folder=FOLDER)


def test_missing_key_and_missing_section_are_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot read: model: vocab_size is missing"):
        read_saved_model(seal_of({}), folder=FOLDER)
