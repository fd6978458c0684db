"""A file that others made is opened without waiting, without following where that is refused, and not beyond a size."""

import os
from pathlib import Path

import pytest
from trellax.meshes import CheckpointError, WeightsError
from trellax.meshes.files.regular_file import open_regular, read_bounded


def test_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    assert read_bounded(tmp_path / "file", max_bytes=4) == b"text"


@pytest.mark.timeout(10)
def test_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="pipe is a named pipe, where a file should be"):
        read_bounded(tmp_path / "pipe", max_bytes=4, error=WeightsError)


@pytest.mark.timeout(10)
def test_endless_device_file_is_refused_even_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a device"):
        read_bounded(tmp_path / "link", max_bytes=4)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        open_regular(tmp_path)


def test_link_is_followed_or_refused_as_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_bounded(tmp_path / "link", max_bytes=4) == b"text"
    with pytest.raises(CheckpointError, match="is a link"):
        read_bounded(tmp_path / "link", max_bytes=4, links="refuse")


def test_file_over_its_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"has 1,099,511,627,776 bytes or more; such a file has at most 1,000\."):
        read_bounded(tmp_path / "sparse", max_bytes=1000)


def test_file_that_says_it_is_empty_and_is_not_is_bounded() -> None:
    with pytest.raises(CheckpointError, match="at most 3"):
        read_bounded("/proc/self/status", max_bytes=3)


def test_missing_file_raises_the_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "nothing", max_bytes=4)
