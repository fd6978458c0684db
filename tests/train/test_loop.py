"""A run writes its folder, and a run that was stopped and resumed is the uninterrupted run, to the digit."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trellax.configs import RunConfig, load_config
from trellax.meshes import RunError
from trellax.train import finish, train
from trellax.train.evaluate import validate
from trellax.train.metrics import read_metrics, read_summary

from .metrics.event_files import hyperparameters

Tiny = Callable[..., RunConfig]

MESH = "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 2 --train.log_every 1"


def quiet() -> Console:
    return Console(file=io.StringIO())


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


def test_run_leaves_metrics_summary_picture_and_checkpoint(tiny: Tiny) -> None:
    config = tiny(f"{MESH} --train.steps 4 --train.eval_every 2")
    talk_file = io.StringIO()
    summary = train(config, console=Console(file=talk_file))
    folder = config.run_folder
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.toml",
        "lock",
        "loss.png",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    }
    assert json.loads((folder / "summary.json").read_text())["mesh"] == "data=2 tensor=2 pipe=2"
    first = read_metrics(folder)[0]
    wanted = {"step", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "peak_memory_bytes"}
    parts = {"device_s", "input_s", "host_s"}
    assert first.keys() == wanted | parts
    assert all(first[name] > 0 for name in wanted)
    assert sum(first[name] for name in parts) == pytest.approx(first["step_time_s"])
    assert [line["step"] for line in read_metrics(folder) if "val_loss" in line] == [2, 4]
    assert summary.steps == 4
    assert load_config(folder / "config.toml") == config
    (shown,) = hyperparameters(folder)
    assert (shown["optimizer.learning_rate"], shown["mesh.pipe"]) == (config.optimizer.learning_rate, 2)
    talk = talk_file.getvalue()
    for part in ("mesh      data=2 tensor=2 pipe=2", "256@pipe+tensor, 32", "rank 1 |", "bubble", "step 4/4", "sha256"):
        assert part in talk


def test_log_removed_after_the_last_step_is_complete(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(f"{MESH} --train.steps 4")

    def remove_and_validate(*args: Any) -> float:
        (config.run_folder / "metrics.jsonl").unlink()
        return validate(*args)

    monkeypatch.setattr(finish, "validate", remove_and_validate)
    train(config, console=quiet())
    assert [line["step"] for line in read_metrics(config.run_folder)] == [1, 2, 3, 4, 4]


SAVING = "--checkpoint.every 2 --checkpoint.keep 9"


def test_resumed_run_is_the_uninterrupted_run(tiny: Tiny) -> None:
    # Of four steps, as other tests here: the number is compiled into the step, which jax caches.
    config = tiny(f"{MESH} --train.steps 4 {SAVING}")
    expected = train(config, console=quiet())
    uncut = losses(config.run_folder)
    # Back to the save at step 2, as if the run had stopped there.
    shutil.rmtree(config.run_folder / "checkpoints" / "4")
    again = train(config, console=quiet())
    assert losses(config.run_folder) == uncut
    assert again.final_val_loss == expected.final_val_loss


@pytest.mark.slow
def test_saves_change_no_loss(tiny: Tiny) -> None:
    saved, unsaved = tiny(f"{MESH} --train.steps 4 {SAVING} --run.name saved"), tiny(f"{MESH} --train.steps 4")
    with_saves, without = train(saved, console=quiet()), train(unsaved, console=quiet())
    assert losses(saved.run_folder) == losses(unsaved.run_folder)
    assert with_saves.final_val_loss == without.final_val_loss


def test_profile_is_written_and_summarized(tiny: Tiny) -> None:
    config = tiny("--mesh.data 8 --train.steps 6")
    talk = io.StringIO()
    train(config, console=Console(file=talk), profile_steps=2)
    names = {path.name.partition(".")[2] or path.name for path in (config.run_folder / "profile").rglob("*.*")}
    assert {"xplane.pb", "trace.json.gz"} <= names
    assert any((config.run_folder / "profile").rglob("perfetto_trace.json.gz"))
    assert "profile   2 steps in" in talk.getvalue()
    assert "matrix" in talk.getvalue()


@pytest.mark.slow
def test_profile_longer_than_the_run_is_dropped(tiny: Tiny) -> None:
    config = tiny("--mesh.data 8 --train.steps 4")
    talk = io.StringIO()
    assert train(config, console=Console(file=talk), profile_steps=9).steps == 4
    assert "profile   9" not in talk.getvalue()


def test_finished_run_takes_no_more_steps(tiny: Tiny) -> None:
    # Brackets are globs to some and markup to others; here they are a name.
    config, talk = tiny("--mesh.data 8 --train.steps 2 --run.name say[v1]b]"), io.StringIO()
    first = train(config, console=quiet())
    again = train(config, console=Console(file=talk))
    assert "runs/say[v1]b], train.steps=2: none to take\n" in talk.getvalue()
    # Speed and time are those of the steps, which the first call took.
    assert again == first == read_summary(config.run_folder)
    assert [line["step"] for line in read_metrics(config.run_folder) if "val_loss" in line] == [2]


def test_fresh_run_has_the_same_losses_and_the_old_one_is_kept(tiny: Tiny) -> None:
    config = tiny("--mesh.data 8 --train.steps 2 --train.log_every 1")
    train(config, console=quiet())
    before = losses(config.run_folder)
    with pytest.raises(RunError, match=r"already holds saves of steps 2"):
        train(config, console=quiet(), start="fresh")
    assert losses(config.run_folder) == before
    train(config, console=quiet(), start="replace")
    assert losses(config.run_folder) == before == losses(config.run_folder / "aside")
    assert (config.run_folder / "aside" / "checkpoints" / "2" / "seal.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["--mesh.data 8", "--mesh.tensor 8 --model.num_heads 8", "--mesh.data 4 --mesh.pipe 2"]
)
def test_run_trains_on_any_mesh(tiny: Tiny, mesh: str) -> None:
    config = tiny(f"{mesh} --train.steps 2 --model.dtype float32 --pipeline.remat full")
    assert train(config, console=quiet()).steps == 2
