"""Fifty kinds of damage to the newest save: it is named, kept aside and the one before used, or the run is refused.

A restore never returns anything but what was saved, bit for bit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.commands import checkpoints as checkpoints_command
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.hub import load_params
from trellax.hub.saves import reader
from trellax.meshes import CheckpointError, MeshSpec, build_mesh
from trellax.pipeline import PipelineParams, natural_order
from trellax.train import Checkpoints, Setup
from trellax.train.checkpoints.initial_weights import weight_shapes
from trellax.train.checkpoints.layer_order import as_pipeline

Damage = Callable[[Path], object]
FILES = {
    "array data": "state/ocdbt.process_0/d/*",
    "index": "state/d/*",
    "manifest": "state/manifest.ocdbt",
    "process manifest": "state/ocdbt.process_0/manifest.ocdbt",
    "array names": "state/_METADATA",
    "shardings": "state/_sharding",
    "array kinds": "state/array_metadatas/process_0",
    "step record": "_CHECKPOINT_METADATA",
    "seal": "seal.json",
}


def one_file(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def flip(place: float) -> Damage:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(place * len(content)), len(content) - 1)] ^= 0x10
        path.write_bytes(content)

    return change


def cut(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


TO_FILES: dict[str, Damage] = {
    "flipped bit": flip(0.5),
    "cut in half": cut(0.5),
    "emptied": cut(0),
    "missing": Path.unlink,
}
TO_DATA: dict[str, Damage] = {
    "flipped first": flip(0),
    "flipped last": flip(1),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": zero,
    "a folder": to_folder,
    "a broken link": to_broken_link,
}


def edit_seal(*, rehash: bool = True, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        outer = json.loads((folder / "seal.json").read_text())
        outer["record"].update(values)
        if rehash:
            outer["sha256"] = hashlib.sha256(json.dumps(outer["record"], sort_keys=True).encode()).hexdigest()
        (folder / "seal.json").write_text(json.dumps(outer))

    return change


def reseal_wrong_data(folder: Path) -> None:
    """Damage from before the hashes were taken: the files are what the seal says, the arrays are not."""
    outer = json.loads((folder / "seal.json").read_text())
    arrays = outer["record"]["arrays"]
    name = next(name for name in arrays if name.startswith("params."))
    arrays[name][2] = "0" * 16
    edit_seal(arrays=arrays)(folder)


def take_state_of_the_other(folder: Path) -> None:
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / "1" / "state", folder / "state")


def take_all_of_the_other(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def write_seal(content: bytes) -> Damage:
    return lambda folder: (folder / "seal.json").write_bytes(content)


TO_FOLDER: dict[str, Damage] = {
    "empty folder": empty,
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("?")),
    "arrays of another step": take_state_of_the_other,
    "copy of another step": take_all_of_the_other,
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "seal that is no text": write_seal(b"\xff\xfe\x00"),
    "seal that is no JSON": write_seal(b"{"),
    "seal that is a list": write_seal(b"[]"),
    "seal nested without end": write_seal(b"[" * 100_000),
    "seal of nothing": write_seal(b'{"sha256": "", "record": {}}'),
    "seal with another config": edit_seal(rehash=False, config={}),
    "seal of another step": edit_seal(step=7),
    "seal with a word for a step": edit_seal(step="two"),
    "seal with a key too many": edit_seal(more=1),
    "seal with wrong sums": reseal_wrong_data,
}
KINDS: dict[str, Damage] = {
    **{
        f"{file}: {kind}": lambda folder, file=file, damage=damage: damage(one_file(folder, FILES[file]))
        for file in FILES
        for kind, damage in TO_FILES.items()
    },
    **{
        f"array data: {kind}": lambda folder, damage=damage: damage(one_file(folder, FILES["array data"]))
        for kind, damage in TO_DATA.items()
    },
    **TO_FOLDER,
}


@pytest.fixture(scope="module")
def setup() -> Setup:
    config = load_config("tiny-dense", ["--model.hidden_size", "8", "--model.num_layers", "1"])
    return Setup(config, build_mesh(MeshSpec(), devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def saved(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """A folder with saves of steps 1 and 2, and what they hold."""
    folder, states = tmp_path_factory.mktemp("saved"), {}
    state = setup.init_state()
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda leaf, step=step: leaf + step, state.params)
            now = replace(state, step=state.step + step, params=params)
            checkpoints.save(now, setup)
            states[step] = jax.device_get(now)
    return folder, states


def natural(params: PipelineParams) -> PipelineParams:
    return PipelineParams(stages=natural_order(params.stages), shared=params.shared)


def equal(ours: Any, theirs: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_there_are_fifty_kinds() -> None:
    assert len(KINDS) >= 50


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_save_is_named_and_the_one_before_is_used(
    kind: str, setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    folder, states = saved
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    KINDS[kind](tmp_path / "checkpoints" / "2")
    told: list[str] = []
    with Checkpoints(tmp_path, say=told.append) as checkpoints:
        restored = jax.device_get(checkpoints.restore(setup))
    assert equal(restored, states[int(restored.step)])
    assert int(restored.step) == 1
    assert told[0].startswith("checkpoint 2 is damaged: ")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged"]


def test_undamaged_save_is_used(setup: Setup, saved: tuple[Path, dict[int, Any]]) -> None:
    folder, states = saved
    with Checkpoints(folder) as checkpoints:
        assert equal(checkpoints.restore(setup), states[2])
        assert equal(as_pipeline(load_params(folder, weight_shapes(setup))), natural(states[2].params))


def test_save_of_another_format_is_refused_and_left_alone(
    setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    edit_seal(format=99)(tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="has format 99"):
        checkpoints.restore(setup)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_folder_with_only_damaged_saves_is_not_taken_for_an_empty_one(
    setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    for step in ("1", "2"):
        flip(0.5)(one_file(tmp_path / "checkpoints" / step, FILES["array data"]))
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            checkpoints.restore(setup)
    assert not Checkpoints(tmp_path).folder.is_empty


def test_state_under_the_name_of_another_step_is_refused(
    setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    # As 9 it would be the newest save for ever, and those of the steps after 2 would be removed as older.
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    edit_seal(step=9)(tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "9")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="9 holds a state of step 2"):
        checkpoints.restore(setup)


def test_whole_save_that_cannot_be_loaded_is_no_damage(
    setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes")

    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.setattr(reader, "load_arrays", refuse)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="2 is whole, but cannot be loaded"):
        checkpoints.restore(setup)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_unfinished_saves_are_no_saves(setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.part")
    (tmp_path / "checkpoints" / "3.part.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.restore(setup).step) == 1
    checkpoints.folder.drop_unfinished()
    assert checkpoints.folder.names == ["1"]


def test_reader_of_parameters_changes_nothing(setup: Setup, saved: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    cut(0.5)(one_file(tmp_path / "checkpoints" / "2", FILES["array data"]))
    params = as_pipeline(load_params(tmp_path, weight_shapes(setup)))
    assert equal(params, natural(saved[1][1].params))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_command_lists_and_verifies(
    saved: tuple[Path, dict[int, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    flip(0.5)(one_file(tmp_path / "checkpoints" / "2", FILES["array data"]))
    # Only reading finds it.
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert main(["checkpoints", str(tmp_path), "--verify", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["name"], row["state"]) for row in rows] == [("1", "verified"), ("2", "damaged")]
    assert "has other bytes than were saved" in rows[1]["problem"]
    assert rows[0]["num_bytes"] > 10_000


def test_command_may_look_while_a_run_removes_and_renames(
    saved: tuple[Path, dict[int, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "3.part").mkdir()
    read, walk = checkpoints_command.read_seal, checkpoints_command.walk_folder

    def read_too_late(folder: Path) -> Any:
        if folder.name == "1":
            shutil.rmtree(folder)
        return read(folder)

    def vanish(path: Path, *, max_depth: int) -> Any:
        for entry in walk(path, max_depth=max_depth):
            shutil.rmtree(tmp_path / "checkpoints" / "3.part", ignore_errors=True)
            yield entry

    (tmp_path / "checkpoints" / "3.part" / "array").write_text("half")
    monkeypatch.setattr(checkpoints_command, "read_seal", read_too_late)
    monkeypatch.setattr(checkpoints_command, "walk_folder", vanish)
    assert main(["checkpoints", str(tmp_path), "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["2"]


def test_no_file_of_a_save_is_a_pickle(saved: tuple[Path, dict[int, Any]]) -> None:
    files = [path for path in (saved[0] / "checkpoints").rglob("*") if path.is_file()]
    # Pickles of protocol 2 and later begin so; array data is inside OCDBT's own format.
    assert len(files) > 10
    assert [path.name for path in files if path.read_bytes()[:1] == b"\x80"] == []
