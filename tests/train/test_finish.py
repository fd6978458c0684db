"""The end of a run is an error if its last validation is not finite."""

from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.meshes import RunError
from trellax.train.finish import check_last_validation


def test_last_validation_that_is_not_finite_is_an_error(golden: Callable[[str, str], None]) -> None:
    for loss in (None, 2.5):
        check_last_validation(loss, step=4, folder=Path("runs/wide"))
    with pytest.raises(RunError) as caught:
        check_last_validation(float("nan"), step=4, folder=Path("runs/wide"))
    golden("errors/train/run_validation_not_finite.txt", f"RunError: {caught.value}")
