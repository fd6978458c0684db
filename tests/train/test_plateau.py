"""A run ends once its validation loss no longer falls, after the same step whether it was interrupted or not."""

import io
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import pytest
from rich.console import Console
from trellax.commands.cli import main
from trellax.configs import RunConfig
from trellax.configs.check import check_run
from trellax.meshes import ConfigError
from trellax.train import train
from trellax.train.metrics import read_metrics
from trellax.train.metrics.plateau import Plateau
from trellax.train.metrics.run_rows import read_run_row

Tiny = Callable[..., RunConfig]

# At so high a rate the loss soon rises and falls from step to step.
WORDS = "--mesh.data 8 --train.steps 12 --train.eval_every 1 --train.eval_batches 1 --optimizer.learning_rate 0.3"
PATIENCE = 2


def test_validations_without_a_lower_loss_are_counted() -> None:
    plateau = Plateau(2)
    for loss, reached in ((3.0, False), (3.0, False), (2.9, False), (float("nan"), False), (2.9, True), (2.8, False)):
        plateau.add(loss)
        assert plateau.is_reached == reached
    assert (
        Plateau(2, record=plateau.record).record
        == plateau.record
        == {"best_val_loss": 2.8, "validations_without_gain": 0}
    )
    never = Plateau(0)
    for _ in range(9):
        never.add(1.0)
    assert not never.is_reached


@pytest.mark.slow
def test_run_ends_on_a_plateau_and_says_so(tiny: Tiny) -> None:
    talk = io.StringIO()
    config = tiny(f"{WORDS} --train.patience {PATIENCE}")
    summary = train(config, console=Console(file=talk))
    losses = [line["val_loss"] for line in read_metrics(config.run_folder) if "val_loss" in line]
    best = min(losses)
    assert losses.index(best) == len(losses) - 1 - PATIENCE
    assert (summary.ended, summary.steps, summary.final_val_loss) == ("plateau", len(losses), losses[-1])
    assert len(losses) < config.train.steps
    assert f"plateau   2 validations in a row without a loss below {best:.4f} (train.patience=2)" in talk.getvalue()
    assert read_run_row(config.run_folder).state == "plateau"


@pytest.mark.slow
def test_interrupted_run_ends_after_the_same_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(f"{WORDS} --run.name whole")
    train(whole)
    losses = [line["val_loss"] for line in read_metrics(whole.run_folder) if "val_loss" in line]
    expected = next(n for n in range(1, len(losses)) if n - 1 - losses[:n].index(min(losses[:n])) >= PATIENCE)
    assert expected < whole.train.steps
    # Each command has time for two steps, by a clock that is a second later whenever it is read.
    words = f"{WORDS} --train.patience {PATIENCE} --train.log_every 100"
    for _ in range(whole.train.steps):
        monkeypatch.setattr("trellax.train.stop.time", SimpleNamespace(monotonic=count().__next__))
        summary = train(tiny(f"{words} --train.seconds 3"))
        if summary.ended == "plateau":
            break
    assert (summary.ended, summary.steps) == ("plateau", expected)
    # The same command takes no step; one with more patience does.
    again = train(tiny(words))
    assert (again.steps, again.final_train_loss) == (expected, summary.final_train_loss)
    assert train(tiny(f"{WORDS} --train.patience 9")).steps > expected


@pytest.mark.slow
def test_command_ends_with_0_and_names_the_plateau(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny()
    own = ["--run.folder", config.run.folder, "--data.source", "text", "--data.paths", *config.data.paths]
    assert main(["train", "tiny-llama", *own, *WORDS.split(), "--train.patience", "2"]) == 0
    out, err = capsys.readouterr()
    assert ", ended on a plateau\n" in out
    assert "plateau   2 validations in a row without a loss below" in err


def test_patience_without_validations_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.patience=2 counts validations, but train\.eval_every=0"):
        check_run(tiny("--mesh.data 8 --train.patience 2"), num_devices=8)
