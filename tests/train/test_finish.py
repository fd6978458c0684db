"""The end of a run is an error if its last validation is not finite."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trellax.meshes import RunError
from trellax.train import train
from trellax.train.finish import check_last_validation


def test_last_validation_that_is_not_finite_is_an_error(golden: Callable[[str, str], None]) -> None:
    for loss in (None, 2.5):
        check_last_validation(loss, step=4, folder=Path("runs/wide"))
    with pytest.raises(RunError) as caught:
        check_last_validation(float("nan"), step=4, folder=Path("runs/wide"))
    golden("errors/train/run_validation_not_finite.txt", f"RunError: {caught.value}")


def test_run_whose_seconds_are_over_is_saved_and_validated_and_goes_on(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--mesh.data 8 --train.batch_size 8 --train.steps 5 --optimizer.lr_schedule wsd"
    # A clock that is a second later whenever it is read: at the start, and before every step.
    monkeypatch.setattr("trellax.train.stop.time", SimpleNamespace(monotonic=count().__next__))
    first = train(tiny(f"{words} --train.seconds 4"))
    assert (first.ended, first.steps) == ("train.seconds", 3)
    assert first.final_val_loss is not None
    again = train(tiny(words))
    assert (again.ended, again.steps) == ("done", 5)
    whole = train(tiny(f"{words} --run.name whole"))
    assert (again.final_train_loss, again.final_val_loss) == (whole.final_train_loss, whole.final_val_loss)
