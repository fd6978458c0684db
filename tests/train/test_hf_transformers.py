"""Against transformers itself, where the extra `hf` is installed: random models of every architecture, both ways.

Tolerances as in test_hf_read.py. transformers runs on torch, on the CPU, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.train.cli import main
from trellax.train.hf_config import read_hub_model

from .hf_doubles import DOUBLES, make
from .hub import MESHES, MODELS, wrong_by
from .make_hf_goldens import answer, save

pytest.importorskip("transformers", reason="needs the extra `hf`: torch and transformers")
pytest.importorskip("torch", reason="needs the extra `hf`: torch and transformers")

# What other people's libraries warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-4
QUICK = ("tensor=2", "tensor=2,pipe=2")


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mesh", [mesh if mesh in QUICK else pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES]
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


@pytest.mark.parametrize("name", [name for name, double in DOUBLES.items() if not double.is_ours])
def test_of_two_sources_that_counts_which_transformers_takes(name: str, tmp_path: Path) -> None:
    folder = make(DOUBLES[name], tmp_path / "model", how=DOUBLES[name].twice)
    logits = answer(folder)
    assert wrong_by(folder, "data=1", logits) < TOLERANCE
    assert main(["import-hf", str(folder), str(tmp_path / "run")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert np.abs(answer(tmp_path / "back") - logits).max() < TOLERANCE
