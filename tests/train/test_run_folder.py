"""A run folder that cannot be held is refused in a sentence, and what is in it never half moved away."""

import fcntl
import os
from pathlib import Path

import pytest
from trellax.meshes import ConfigError
from trellax.train.run_folder import open_run_folder
from trellax.train.save_folder import FOLDER, SaveFolder


def test_lock_that_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ConfigError, match="cannot be written: Function not implemented"),
        open_run_folder(tmp_path, start="resume", say=print),
    ):
        pass


def test_run_that_was_half_moved_aside_is_still_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER / "40").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    rename = Path.rename

    def rename_once(path: Path, target: Path) -> Path:
        if (tmp_path / "aside").is_dir() and any((tmp_path / "aside").iterdir()):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt), open_run_folder(tmp_path, start="replace", say=print):
        pass
    # Without its saves the next start would begin anew, and its metrics would be dropped.
    assert SaveFolder(tmp_path / FOLDER).steps == [40]
