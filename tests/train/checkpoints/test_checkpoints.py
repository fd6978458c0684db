"""A state saved on one mesh is restored on another, bit for bit."""

import queue
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from trellax.configs import RunConfig
from trellax.meshes import CheckpointError, MeshSpec, build_mesh
from trellax.pipeline import natural_order
from trellax.train import Checkpoints, Setup, TrainState
from trellax.train.checkpoints import store as checkpoint

Tiny = Callable[..., RunConfig]


def make_setup(config: RunConfig, mesh: str) -> Setup:
    return Setup(config, build_mesh(MeshSpec.parse(mesh)))


def arrays(tree: object) -> list[np.ndarray]:
    # The stack dimensions [chunks, ranks, layers] differ between meshes, their order does not.
    return [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]


def natural(setup: Setup, state: TrainState) -> list[np.ndarray]:
    counts = setup.model.fns.layers_per_stage
    stages = natural_order(state.params.stages, layers_per_stage=counts, placement=setup.placement)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((stages, state.params.shared))]


@pytest.mark.parametrize(
    ("other", "extra"),
    [
        ("data=2,tensor=4", "--train.shard optimizer --train.ema 0.9"),
        ("data=4,pipe=2", "--train.shard layer --optimizer.kind muon"),
        pytest.param("data=8", "--train.shard step", marks=pytest.mark.slow),
    ],
)
def test_state_saved_on_one_mesh_is_restored_on_another(tiny: Tiny, tmp_path: Path, other: str, extra: str) -> None:
    config = tiny(extra)
    saved = make_setup(config, "data=2,tensor=2,pipe=2")
    state = saved.init_state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, saved)
        checkpoints.wait()
        setup = make_setup(config, other)
        restored = checkpoints.restore(setup)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(state), arrays(restored), strict=True))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == setup.shardings


UNEVEN = {
    "by hand": ("data=2,tensor=2,pipe=2", "--pipeline.layers_per_stage 5,2"),
    "chunks": ("data=2,tensor=2,pipe=2", "--pipeline.schedule interleaved-1f1b --pipeline.chunks 2"),
    "v": ("data=2,tensor=2,pipe=2", "--pipeline.schedule v-half --pipeline.chunks 2 --pipeline.vocab ends"),
    "balanced": ("data=2,pipe=4", ""),
    "whole vocabulary": ("tensor=2,pipe=4", "--pipeline.vocab ends"),
    "one rank": ("data=8", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_seven_layers_move_between_stages_of_any_depth(tiny: Tiny, tmp_path: Path, name: str) -> None:
    saved = make_setup(tiny("--model.num_layers 7 --train.shard optimizer"), "data=2,pipe=4")
    mesh, words = UNEVEN[name]
    setup = make_setup(tiny(f"--model.num_layers 7 {words}"), mesh)
    state = saved.init_state()
    with Checkpoints(tmp_path / "there", keep=1) as there, Checkpoints(tmp_path / "back", keep=1) as back:
        there.save(state, saved)
        there.wait()
        moved = there.restore(setup)
        back.save(moved, setup)
        back.wait()
        again = back.restore(saved)
    assert all(np.array_equal(a, b) for a, b in zip(natural(saved, state), natural(setup, moved), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(arrays(state), arrays(again), strict=True))


def test_only_the_newest_saves_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    setup = make_setup(tiny(), "data=8")
    state = setup.init_state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(replace(state, step=state.step + step), setup)
        assert checkpoints.last_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_save_of_another_model_is_refused_with_the_arrays_that_differ(
    tiny: Tiny, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    saved = make_setup(tiny(), "data=8")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(saved.init_state(), saved)
        checkpoints.wait()
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(make_setup(tiny("--model.num_layers 4 --model.bias on"), "data=8"))
    golden("errors/train/checkpoint_other_model.txt", f"CheckpointError: {caught.value}".replace(str(tmp_path), "RUN"))


def test_folder_without_a_save_is_refused(tiny: Tiny, tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(make_setup(tiny(), "data=8"))
    golden("errors/train/checkpoint_none.txt", f"CheckpointError: {caught.value}".replace(str(tmp_path), "RUN"))


def test_failed_save_is_announced_before_anybody_waits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The watches of all processes end them then; none of them gets as far as to ask.
    announced: queue.Queue[BaseException] = queue.Queue()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_seal", refuse)
    monkeypatch.setattr(checkpoint, "announce_failure", announced.put)
    checkpoints = Checkpoints(tmp_path)
    setup = make_setup(tiny(), "data=8")
    checkpoints.save(setup.init_state(), setup)
    assert re.match(
        r"step 0 could not be saved in .*: No space left on device. Nothing was saved yet.",
        str(announced.get(timeout=60)),
    )
    with pytest.raises(CheckpointError, match="step 0 could not be saved"):
        checkpoints.wait()
    assert checkpoints.folder.names == []


def test_save_whose_run_folder_moves_meanwhile_says_that(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(checkpoint, "require_all", lambda *_: run.rename(tmp_path / "away"))
    checkpoints = Checkpoints(run)
    setup = make_setup(tiny(), "data=8")
    checkpoints.save(setup.init_state(), setup)
    with pytest.raises(
        CheckpointError, match="run was moved or removed while the run wrote to it: step 0 is not saved"
    ):
        checkpoints.wait()
