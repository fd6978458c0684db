"""A save gets its name once it is on the disk, and never replaces another save."""

import os
from pathlib import Path

import pytest
from trellax.hub.saves.names import SaveFolder


def write_part(folder: SaveFolder, step: int, text: str) -> None:
    (folder.part(step) / "state" / "d").mkdir(parents=True)
    for name in ("seal.json", "state/manifest", "state/d/array"):
        (folder.part(step) / name).write_text(text)


def test_every_file_and_folder_is_on_the_disk_before_the_save_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forced = SaveFolder(tmp_path), []

    def force(descriptor: int) -> None:
        forced.append((os.fstat(descriptor).st_ino, (folder / 4).exists()))

    monkeypatch.setattr(os, "fsync", force)
    write_part(folder, 4, "four")
    folder.publish(4)
    inside = {path.stat().st_ino for path in [folder / 4, *(folder / 4).rglob("*")]}
    assert {number for number, is_named in forced if not is_named} == inside
    assert forced[-1] == (tmp_path.stat().st_ino, True)


def test_save_is_never_removed_for_another_of_its_step(tmp_path: Path) -> None:
    folder = SaveFolder(tmp_path)
    for text in ("first", "second"):
        write_part(folder, 4, text)
        if text == "first":
            folder.publish(4)
    with pytest.raises(OSError, match="not empty"):
        folder.publish(4)
    assert (folder / 4 / "seal.json").read_text() == "first"
