"""Saved on 2x2x2 with 1F1B, resumed on another mesh by another schedule: the same run, and the same data in order.

Losses agree to 1e-5 of their size: the sums of a step are taken in another order, and 20 steps of AdamW carry the
rounding of float32 (1e-7) on.
"""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from trellax.configs import RunConfig, load_config
from trellax.meshes import RunError
from trellax.meshes.spec import SHARDS
from trellax.train import Batches, Checkpoints, initial_state, load_corpus, prepare, train

from .conftest import losses

SAVED, STEPS = 4, 24
OTHERS = {
    "one device a pipe": "--mesh.data 8 --pipeline.microbatches 1",
    "interleaved": "--mesh.data 4 --mesh.pipe 2 --pipeline.schedule interleaved-1f1b --pipeline.chunks 2",
    "data": "--mesh.data 4 --mesh.tensor 2",
    "tensor": "--mesh.tensor 4 --mesh.data 2 --pipeline.microbatches 4",
    "deep": "--mesh.pipe 4 --mesh.data 2",
    "deep and whole vocabulary": "--mesh.pipe 4 --mesh.tensor 2 --pipeline.vocab ends",
    "all pipe": "--mesh.pipe 8 --pipeline.microbatches 8",
    "uneven": "--mesh.pipe 2 --mesh.data 2 --mesh.tensor 2 --pipeline.layers_per_stage 5,3",
    "zero bubble": "--mesh.pipe 4 --mesh.data 2 --pipeline.schedule zb-h1",
    "interleaved zero bubble": "--mesh.pipe 2 --mesh.data 4 --pipeline.schedule interleaved-zb-h1 --pipeline.chunks 4",
    "gpipe": "--mesh.pipe 2 --mesh.tensor 4 --pipeline.schedule gpipe --pipeline.remat full",
    "tensor and gpipe": "--mesh.pipe 4 --mesh.tensor 2 --pipeline.schedule gpipe --pipeline.microbatches 4",
}


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def make(folder: Path) -> Callable[..., RunConfig]:
    def make(words: str) -> RunConfig:
        own = ["--run.folder", str(folder), "--data.source", "text", "--data.paths", str(folder / "corpus.txt")]
        sizes = "--model.num_layers 8 --train.steps 24 --train.log_every 1 --train.eval_batches 1 --train.batch_size 16"
        rest = "--optimizer.learning_rate 1e-3 --pipeline.microbatches 2"
        return load_config("tiny-dense", [*own, *sizes.split(), *rest.split(), *words.split()])

    return make


@pytest.fixture(scope="module")
def uncut(make: Callable[..., RunConfig]) -> Path:
    """The folder of a run that was never stopped, with its save of step 4."""
    config = make(
        f"--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --checkpoint.every {SAVED} --checkpoint.keep 9 --run.name uncut"
    )
    train(config, console=quiet())
    return config.run_folder


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", OTHERS)
def test_run_goes_on_the_same_on_another_mesh(
    name: str, shard: str, uncut: Path, make: Callable[..., RunConfig], folder: Path
) -> None:
    config = make(f"{OTHERS[name]} --train.shard {shard} --run.name {name.replace(' ', '-')}-{shard}")
    shutil.copytree(uncut / "checkpoints" / str(SAVED), config.run_folder / "checkpoints" / str(SAVED))
    train(config, console=quiet())
    expected, here = losses(uncut), losses(config.run_folder)
    assert sorted(here) == list(range(SAVED + 1, STEPS + 1))
    np.testing.assert_allclose([here[step] for step in here], [expected[step] for step in here], rtol=1e-5)


def save_untrained(config: RunConfig, *, step: int) -> None:
    """Save the initial state as that of a later step: what resuming compares is the record, not the weights."""
    setup = prepare(config)
    state = replace(initial_state(setup), step=jax.device_put(np.int32(step), setup.shardings.step))
    place = {"batches": step, "sequences": step * config.train.batch_size, "corpus": load_corpus(config.data).sha256}
    with Checkpoints(config.run_folder) as checkpoints:
        checkpoints.save(state, setup, data=place)


def test_config_that_matters_is_not_changed_by_mistake(
    make: Callable[..., RunConfig], folder: Path, golden: Callable[[str, str], None]
) -> None:
    save_untrained(make("--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --run.name changed"), step=SAVED)
    sizes = "--mesh.data 8 --pipeline.microbatches 1"
    config = make(f"{sizes} --run.name changed --train.batch_size 8 --optimizer.learning_rate 0.5 --run.seed 1")
    with (folder / "corpus.txt").open("ab") as file:
        file.write(b"more")
    try:
        with pytest.raises(RunError) as caught:
            train(config, console=quiet())
    finally:
        (folder / "corpus.txt").write_bytes((folder / "corpus.txt").read_bytes()[:-4])
    golden("errors/train/run_changed.txt", f"RunError: {caught.value}".replace(str(folder), "RUNS"))


def test_batches_of_another_size_go_on_where_the_last_ended() -> None:
    def make(batch_size: int, first: int = 0) -> Batches:
        tokens = np.arange(200, dtype=np.uint8)
        return Batches(tokens, seq_len=8, batch_size=batch_size, microbatches=1, seed=3, first_sequence=first)

    rows = [make(1)[index]["tokens"][0, 0].tolist() for index in range(40)]
    small = make(4)
    seen = small.num_sequences(3)
    large = make(10, first=seen - 3 * 10)
    assert seen == 12
    assert [row.tolist() for step in range(3) for row in small[step]["tokens"][0]] == rows[:12]
    assert [row.tolist() for step in (3, 4) for row in large[step]["tokens"][0]] == rows[12:32]
