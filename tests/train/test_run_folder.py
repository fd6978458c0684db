"""A run folder that cannot be locked is refused with an error, and its content is never moved away in part."""

import fcntl
import os
from pathlib import Path

import pytest
from trellax.hub.saves.names import FOLDER, SaveFolder
from trellax.meshes import ConfigError, RunError
from trellax.train.run_folder import open_run_folder


def test_lock_refused_by_the_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ConfigError, match="cannot be written: Function not implemented"),
        open_run_folder(tmp_path, start="resume", say=print),
    ):
        pass


def test_run_moved_aside_in_part_is_still_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_entries_that_are_not_read_are_reported(tmp_path: Path) -> None:
    for name in ("xla", "checkpoints/007", "checkpoints/²", "checkpoints/7", "checkpoints/notes"):
        (tmp_path / name).mkdir(parents=True)
    told: list[str] = []
    with open_run_folder(tmp_path, start="resume", say=told.append):
        pass
    assert [text.partition(" is no")[0] for text in told] == [
        f"{tmp_path}/checkpoints/007",
        f"{tmp_path}/checkpoints/²",
        f"{tmp_path}/xla, where trellax once kept compiled programs,",
    ]


def test_lock_that_is_removed_is_taken_again(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, start="resume", say=print) as held:
        (tmp_path / "lock").unlink()
        held.check()
        with (
            pytest.raises(RunError, match="is in use by process"),
            open_run_folder(tmp_path, start="resume", say=print),
        ):
            pass


def test_lock_that_another_run_has_taken_stops_the_first(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, start="resume", say=print) as held:
        (tmp_path / "lock").unlink()
        with (
            open_run_folder(tmp_path, start="resume", say=print),
            pytest.raises(RunError, match="is in use by process"),
        ):
            held.check()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_moved_folder_is_an_error(is_made_anew: bool, tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "run", start="resume", say=print) as held:
        (tmp_path / "run").rename(tmp_path / "away")
        if is_made_anew:
            (tmp_path / "run").mkdir()
        with pytest.raises(RunError, match="run was moved or removed while the run wrote to it"):
            held.check()


def test_moved_parent_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A relative path would still lead there, and the saves go to an absolute one.
    (tmp_path / "above").mkdir()
    monkeypatch.chdir(tmp_path / "above")
    with open_run_folder(Path("runs/run"), start="resume", say=print) as held:
        (tmp_path / "above").rename(tmp_path / "moved")
        with pytest.raises(RunError, match="above/runs/run was moved or removed while the run wrote to it"):
            held.check()
