"""A file that changes while a run reads it is an error, however it changes; an identical copy is not a change."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.meshes import DataError
from trellax.train.data.hashed_file import HashedFile

HEADER, TOKENS = b"header", bytes(range(200))


@pytest.fixture
def hashed(tmp_path: Path) -> HashedFile:
    (tmp_path / "tokens.bin").write_bytes(HEADER + TOKENS)
    file = HashedFile(tmp_path / "tokens.bin")
    file.expect(hashlib.sha256(TOKENS).hexdigest(), offset=len(HEADER), num_bytes=len(TOKENS))
    return file


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")


def write_with_the_old_time(path: Path) -> None:
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_through_a_map(path: Path) -> None:
    import numpy as np

    content = np.memmap(path, np.uint8, mode="r+")
    content[100] = 255
    content.flush()


def put_another_in_its_place(path: Path) -> None:
    path.with_name("other").write_bytes(HEADER + TOKENS[::-1])
    path.with_name("other").rename(path)


def put_a_pipe_in_its_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "in place": (write_in_place, "changed while the run read it: it has other tokens"),
    "with the old time": (write_with_the_old_time, "changed while the run read it: it has other tokens"),
    "through a map": (write_through_a_map, "changed while the run read it: it has other tokens"),
    "another file": (put_another_in_its_place, "changed while the run read it: it has other tokens"),
    "shorter": (lambda path: os.truncate(path, 50), "changed while the run read it: 50 bytes, not 206"),
    "removed": (Path.unlink, "lost while the run read it: No such file or directory"),
    "a pipe": (put_a_pipe_in_its_place, "changed while the run read it: 0 bytes, not 206"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", CHANGES)
def test_change_is_an_error(kind: str, hashed: HashedFile) -> None:
    hashed.check()
    change, text = CHANGES[kind]
    change(hashed.path)
    for _ in range(2):
        with pytest.raises(DataError, match=f"tokens.bin: {text}"):
            hashed.check()


def replace_by_a_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


@pytest.mark.parametrize("same", [Path.touch, lambda path: path.chmod(0o600), replace_by_a_copy])
def test_same_bytes_are_not_a_change(same: Callable[[Path], object], hashed: HashedFile) -> None:
    same(hashed.path)
    hashed.check()
    write_in_place(hashed.path)
    with pytest.raises(DataError, match="other tokens"):
        hashed.check()


def test_change_between_opening_and_hashing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(TOKENS)
    file = HashedFile(tmp_path / "tokens.bin")
    write_in_place(file.path)
    with pytest.raises(DataError, match="other tokens"):
        file.expect(hashlib.sha256(TOKENS).hexdigest(), offset=0, num_bytes=len(TOKENS))
