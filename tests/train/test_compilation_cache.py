"""Compiled programs are cached in a folder that only the user can write, never in a run folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from trellax.train import compilation_cache
from trellax.train.compilation_cache import MAX_BYTES, enable_compilation_cache, find_other_writer

CONFIG: Any = jax.config
ROOT = Path(__file__).parents[2]


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user who has said nothing about caches, and the home of that user."""
    before = CONFIG.jax_compilation_cache_dir, CONFIG.jax_compilation_cache_max_size
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TRELLAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    CONFIG.update("jax_compilation_cache_dir", None)
    yield tmp_path
    CONFIG.update("jax_compilation_cache_dir", before[0])
    CONFIG.update("jax_compilation_cache_max_size", before[1])


def test_programs_are_cached_in_a_folder_of_the_user_alone(unset: Path) -> None:
    assert enable_compilation_cache() == ""
    assert CONFIG.jax_compilation_cache_dir == str(unset / ".cache" / "trellax" / "xla")
    assert CONFIG.jax_compilation_cache_max_size == MAX_BYTES
    assert (unset / ".cache" / "trellax" / "xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "TRELLAX_CACHE"])
def test_environment_variable_sets_the_folder(variable: str, unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(unset / "other"))
    assert enable_compilation_cache() == ""
    inside = Path("trellax", "xla") if variable == "XDG_CACHE_HOME" else Path()
    assert CONFIG.jax_compilation_cache_dir == str(unset / "other" / inside)


def test_cache_can_be_switched_off(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLAX_CACHE", "off")
    assert enable_compilation_cache() == ""
    assert CONFIG.jax_compilation_cache_dir is None
    assert not any(unset.iterdir())


def test_cache_configured_in_jax_is_left_alone(unset: Path) -> None:
    CONFIG.update("jax_compilation_cache_dir", "elsewhere")
    assert enable_compilation_cache() == ""
    assert CONFIG.jax_compilation_cache_dir == "elsewhere"


@pytest.mark.parametrize(
    ("place", "mode"), [("xla", 0o777), ("xla", 0o770), ("xla", 0o1777), ("trellax", 0o777), (".cache", 0o757)]
)
def test_folder_that_others_can_change_is_not_used(place: str, mode: int, unset: Path) -> None:
    folder = unset / ".cache" / "trellax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    changed = next(one for one in (folder, *folder.parents) if one.name == place)
    changed.chmod(mode)
    assert enable_compilation_cache() == (
        f"compiled programs are not kept: others can write to {changed}. Set TRELLAX_CACHE to a folder of your own, "
        "or to off."
    )
    assert CONFIG.jax_compilation_cache_dir is None


def test_folder_of_another_user_is_not_used_through_a_link_either(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unset / "theirs").mkdir(mode=0o700)
    (unset / "mine").symlink_to("theirs")
    monkeypatch.setenv("TRELLAX_CACHE", str(unset / "mine"))
    assert enable_compilation_cache() == ""
    CONFIG.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation_cache.os, "getuid", lambda: 12345)
    assert f"{unset / 'theirs'} belongs to another user" in enable_compilation_cache()


def test_home_that_cannot_be_written_gives_a_warning(unset: Path) -> None:
    (unset / ".cache").write_text("a file")
    assert "are not kept: [Errno 20] Not a directory" in enable_compilation_cache()


def test_sticky_folder_may_hold_the_cache(tmp_path: Path) -> None:
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "shared" / "mine").chmod(0o700)
    assert find_other_writer(tmp_path / "shared" / "mine") == ""


def test_entry_of_a_process_killed_while_it_wrote_is_dropped(unset: Path) -> None:
    folder = unset / ".cache" / "trellax" / "xla"
    folder.mkdir(parents=True, mode=0o700)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"")
    assert enable_compilation_cache() == ""
    assert sorted(file.name for file in folder.iterdir()) == [".lockfile", "whole-atime", "whole-cache"]


@pytest.mark.slow
def test_runs_share_their_programs_and_run_folders_hold_none(tmp_path: Path) -> None:
    kept = tmp_path / "trellax" / "xla"
    own = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / ".src"), "XLA_FLAGS": ""}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | own
    words = (
        f"train tiny-dense --run.folder {tmp_path} --train.steps 2 --train.eval_batches 1 --optimizer.warmup_steps 1"
    )
    entries = []
    for seed in "12":
        more = f" --run.seed {seed} --optimizer.learning_rate {seed}e-3 --run.name run{seed}"
        subprocess.run(
            [sys.executable, "-m", "trellax.commands.cli", *f"{words}{more}".split()], env=environment, check=True
        )
        entries.append(sorted(entry.name for entry in kept.glob("*-cache")))
    assert entries[0]
    assert entries[0] == entries[1]
    assert not [path for path in tmp_path.glob("run?/**/*") if path.name.endswith(("-cache", "xla"))]
