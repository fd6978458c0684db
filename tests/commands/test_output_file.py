"""A file that cannot be written is refused, before the work where that can be known and after it otherwise."""

import os
from pathlib import Path

import pytest
from trellax.commands.output_file import check_output_files, write_output_file
from trellax.meshes import ConfigError


def test_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("", "nowhere/x", "file/x", "x" * 300):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_output_files(None, "", str(tmp_path / "new"), str(tmp_path / name))


def test_file_that_turns_out_not_to_be_writable_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: is a directory"):
        write_output_file(str(tmp_path), b"")


def test_older_file_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old one")
    check_output_files(str(file))
    write_output_file(str(file), b"new")
    assert file.read_bytes() == b"new"
    assert capsys.readouterr().err == f"wrote {file}\n"


def test_link_leads_to_the_file_that_is_written(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    write_output_file(str(link), b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output_file(str(pipe), b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert pipe.is_fifo()
