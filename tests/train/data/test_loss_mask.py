"""A mask beside an array of tokens says which of them are targets; it is part of the corpus, and of its hash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError
from trellax.train import train
from trellax.train.data.batches import Batches
from trellax.train.data.corpus import load_corpus
from trellax.train.data.validation_batches import ValidationBatches

SIZES: Any = {"seq_len": 8, "batch_size": 4, "microbatches": 2}


def load(*paths: str, **values: Any) -> Any:
    section = {"source": "tokens", "seq_len": 8, "val_fraction": 0.25, "paths": paths} | values
    return load_corpus(DataSection.model_validate(section))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(200, dtype=np.uint16))
    np.save("a.mask.npy", (np.arange(200) % 3 == 0).astype(np.uint8))
    np.save("b.npy", 1_000 + np.arange(100, dtype=np.uint16))


def counted(batches: Any, *, steps: int) -> list[tuple[int, bool]]:
    """Return the targets of some batches, and whether each counts."""
    found = []
    for step in range(steps):
        batch = batches[step]
        assert batch["weights"].sum(dtype=np.float64) <= 1 + 1e-6
        found += zip(batch["targets"].ravel().tolist(), (batch["weights"] > 0).ravel().tolist(), strict=True)
    return found


@pytest.mark.parametrize("paths", [["*.npy"], ["a.npy", "b.npy"]])
@pytest.mark.parametrize("weights", [(), (1, 2)])
def test_targets_that_the_mask_leaves_out_weigh_nothing(paths: list[str], weights: tuple[float, ...]) -> None:
    if weights and len(paths) == 1:
        paths = ["a.npy", "[b].npy"]
    corpus = load(*paths, weights=weights)
    found = counted(Batches(corpus.train_sources, **SIZES, seed=0), steps=12)
    found += counted(ValidationBatches(corpus.validation_sources, **SIZES, max_batches=2), steps=1)
    assert {target // 1_000 for target, _ in found} == {0, 1}
    # A file without a mask counts whole.
    assert all(counts == (target >= 1_000 or target % 3 == 0) for target, counts in found)


def test_weights_of_a_batch_are_equal_and_sum_to_one() -> None:
    weights = Batches(load("a.npy").train_sources, **SIZES, seed=0)[3]["weights"]
    assert weights.sum() == pytest.approx(1)
    assert np.unique(weights).size == 2


def test_mask_and_packing_leave_out_together() -> None:
    np.save("c.npy", np.arange(200, dtype=np.uint16) % 10)
    np.save("c.mask.npy", np.arange(200) % 10 != 5)
    batches = Batches(load("c.npy", packing="on", end_id=7).train_sources, **SIZES, seed=0)
    for step in range(6):
        batch = batches[step]
        assert np.array_equal(batch["weights"] > 0, (batch["targets"] != 5) & (batch["tokens"] != 7))


def test_mask_is_part_of_the_corpus() -> None:
    before = load("a.npy")
    mask = np.load("a.mask.npy")
    mask[7] ^= 1
    np.save("a.mask.npy", mask)
    with pytest.raises(DataError, match=r"a\.mask\.npy: changed while the run read it"):
        before.check_files()
    after = load("a.npy")
    Path("a.mask.npy").unlink()
    assert len({own.sha256 for own in (before, after, load("a.npy"))}) == 3


MASKS: dict[str, tuple[Callable[[], Any], str]] = {
    "other size": (lambda: np.ones(199, np.uint8), r"a\.mask\.npy: the mask is uint8\[199\], beside 200 tokens"),
    "other type": (lambda: np.ones(200), r"the mask is float64\[200\]"),
    "other numbers": (lambda: np.full(200, 2, np.uint8), "a mask has 2; it is 0 or 1"),
}


@pytest.mark.parametrize("name", MASKS)
def test_array_that_is_no_mask_is_refused(name: str) -> None:
    make, message = MASKS[name]
    np.save("a.mask.npy", make())
    with pytest.raises(DataError, match=message):
        load("a.npy")
    Path("a.mask.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"a\.mask\.npy: this is no \.npy array"):
        load("a.npy")


@pytest.mark.slow
def test_loss_is_that_of_the_targets_alone_on_any_mesh(tiny: Callable[..., Any]) -> None:
    ids = np.arange(4_000, dtype=np.uint16) * 7 % 250
    np.save("c.npy", ids)
    np.save("c.mask.npy", (ids % 2).astype(np.uint8))
    words = "--data.source tokens --data.paths c.npy --train.steps 3 --train.batch_size 8 --pipeline.microbatches 2"
    meshes = {"one": "--mesh.data 4 --mesh.tensor 2", "other": "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2"}
    losses = [train(tiny(f"{words} --run.name {name} {mesh}")).final_val_loss for name, mesh in meshes.items()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    Path("c.mask.npy").unlink()
    assert train(tiny(f"{words} --run.name all {meshes['one']}")).final_val_loss != pytest.approx(losses[0], rel=1e-3)
