"""A file is replaced whole or not at all, and a link in its place is no way to another file."""

from pathlib import Path

import pytest
from trellax.meshes.files.own_file import Writers, replace_file, replacing_file


@pytest.mark.parametrize("writers", ["one", "many"])
def test_file_that_is_not_finished_replaces_nothing(writers: Writers, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old")

    def fail() -> None:
        with replacing_file(file, writers=writers) as stream:
            stream.write(b"half")
            assert file.read_bytes() == b"old"
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_link_is_replaced_and_its_target_is_not(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    replace_file(link, b"new")
    assert (link.read_bytes(), link.is_symlink(), target.read_bytes()) == (b"new", False, b"old")


def test_part_that_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "x.part").symlink_to(tmp_path / "elsewhere")
    replace_file(tmp_path / "x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_many_writers_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with replacing_file(file, writers="many") as first:
        first.write(b"first")
        with replacing_file(file, writers="many") as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]
