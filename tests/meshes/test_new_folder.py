"""A folder appears whole, and what another process writes is left alone."""

from pathlib import Path

import pytest
from trellax.meshes import WeightsError
from trellax.meshes.files.new_folder import new_folder


def test_two_processes_of_one_id_do_not_remove_each_others_files(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with new_folder(tmp_path / "out") as mine:
        (mine / "weights").write_text("mine")
        with pytest.raises(WeightsError):
            fail()
        assert (mine / "weights").read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]
