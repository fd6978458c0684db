"""A store of arrays by path: no trainer is needed to save, find, keep and read them."""

import ast
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from trellax.hub.saves.reader import Damaged, SaveReader
from trellax.hub.saves.seal import Seal
from trellax.meshes import CheckpointError
from trellax.train.checkpoints import store as store_module
from trellax.train.checkpoints.store import SaveStore

CONFIG = {"model": {"layers": 2}}


def arrays_of(step: int) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    return {
        "params.kernel": jax.device_put(np.arange(32, dtype=np.float32).reshape(16, 2) + step, split),
        "step": jax.device_put(np.int32(step), whole),
    }


def shapes_of(arrays: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in arrays.items()}


def save_steps(folder: Path, *steps: int, keep: int = 9, keep_every: int = 0) -> SaveStore:
    with SaveStore(folder, keep=keep, keep_every=keep_every) as store:
        for step in steps:
            store.save(step, arrays_of(step), config=CONFIG, data={"batches": step})
    return store


def test_arrays_and_record_come_back_with_another_sharding(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 3)
    seal, found = SaveReader(folder=store.folder).read(lambda _: shapes_of(arrays_of(3)))
    assert (seal.step, seal.config, seal.data) == (3, CONFIG, {"batches": 3})
    assert all(np.array_equal(found[path], leaf) for path, leaf in arrays_of(3).items())
    assert {device for leaf in found.values() for device in leaf.devices()} == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"), [(1, 0, [6]), (2, 0, [5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6])]
)
def test_newest_saves_and_those_of_every_so_many_steps_are_kept(
    keep: int, keep_every: int, kept: list[int], tmp_path: Path
) -> None:
    store = save_steps(tmp_path, *range(1, 7), keep=keep, keep_every=keep_every)
    assert store.folder.steps == kept


@pytest.mark.parametrize("damaged", ["set aside", "pass over"])
def test_damaged_save_is_skipped_for_the_one_before(damaged: Damaged, tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1, 2)
    (store.folder / 2 / "state" / "manifest.ocdbt").unlink()
    told: list[str] = []
    reader = SaveReader(folder=store.folder, damaged=damaged, say=told.append)
    seal, _ = reader.read(lambda _: shapes_of(arrays_of(1)))
    assert seal.step == 1
    assert told[0].startswith("checkpoint 2 is damaged: state/manifest.ocdbt is missing.")
    assert store.folder.names == (["1", "2"] if damaged == "pass over" else ["1", "2.damaged"])


def test_record_that_its_owner_finds_wrong_is_damage(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1, 2)

    def check(seal: Seal) -> str:
        return "too many batches" if seal.data["batches"] == 2 else ""

    reader = SaveReader(folder=store.folder, check=check)
    newest = reader.newest()
    assert newest
    assert newest.step == 1


def test_folder_without_a_save_has_no_newest(tmp_path: Path) -> None:
    reader = SaveReader(folder=SaveStore(tmp_path).folder)
    assert reader.newest() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        reader.require_newest()


def test_failed_save_is_raised_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = save_steps(tmp_path, 1)
    monkeypatch.setattr(store_module, "write_seal", refuse)
    monkeypatch.setattr(store_module, "announce_failure", lambda _: None)
    store.save(2, arrays_of(2), config=CONFIG, data={})
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*: No space left on device. The save of"):
        store.save(3, arrays_of(3), config=CONFIG, data={})
    assert store.folder.names == ["1"]


def test_store_and_format_know_no_trainer_and_no_model() -> None:
    root = Path(store_module.__file__).parents[2]
    files = [root / "train/checkpoints/store.py", *(root / "hub/saves").glob("*.py")]
    names = {
        alias.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert "Seal" in names
    assert names & {"RunConfig", "Setup", "TrainState", "PipelineParams", "ModelConfig", "Transformer"} == set()
