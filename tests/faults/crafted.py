"""Run folders made to do harm: seals with the right hash and wrong contents, links, pipes, endless files."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Craft = Callable[[Path, Path], object]
"""Changes the newest save of a run folder, given the folder and a place outside that nobody may touch."""


def reseal(save: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a seal, and hash it anew."""
    record = json.loads((save / "seal.json").read_text())["record"]
    change(record)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (save / "seal.json").write_text(json.dumps({"sha256": digest, "record": record}))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**300, 10**4000, 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "1", "²", "٣", "x" * 5000, "\0", "\x1b[31m", "\ud800", "../../outside", "/etc/passwd", "a/../../b", "."),
)
CONTAINERS: tuple[Any, ...] = ([], {}, [[]], [1, 2, 3], {"": {}}, {"a": {"b": {"c": 1}}}, nested(50), [None] * 1000)
NAMES = ("../outside/file", "/etc/passwd", "state/../../../outside/file", "state//d", ".", "..", "", "a\0b", "x" * 300)


def draw_value(rng: random.Random) -> Any:
    return rng.choice(SCALARS if rng.random() < 0.7 else CONTAINERS)


def mutate(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one place in it changed: another value, a key too many, one too few, another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        choice, rest = rng.random(), {name: other for name, other in value.items() if name != key}
        if choice < 0.7:
            return value | {key: mutate(value[key], rng)}
        if choice < 0.8:
            return rest
        if choice < 0.9:
            return value | {rng.choice([*NAMES, "new", "²"]): draw_value(rng)}
        return rest | {rng.choice(NAMES): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutate(value[place], rng), *value[place + 1 :]]
    return draw_value(rng)


def craft_seal(seed: int) -> Craft:
    """A seal with one to three changes, its hash right."""

    def change(run_folder: Path, outside: Path) -> None:
        rng = random.Random(seed)

        def edit(record: dict[str, Any]) -> None:
            for _ in range(rng.choice([1, 1, 2, 3])):
                field = rng.choice(sorted(record))
                record[field] = mutate(record[field], rng)

        reseal(run_folder / "checkpoints" / "2", edit)

    return change


def put_link(name: str, target: str = "") -> Craft:
    """A link in place of an entry, to a file or folder outside."""

    def change(run_folder: Path, outside: Path) -> None:
        _remove(run_folder / name)
        (run_folder / name).symlink_to(outside / (target or Path(name).name))

    return change


def put_pipe(name: str) -> Craft:
    def change(run_folder: Path, outside: Path) -> None:
        _remove(run_folder / name)
        os.mkfifo(run_folder / name)

    return change


def put_endless(name: str, *, num_bytes: int = 1 << 40) -> Craft:
    """A file of a tebibyte that takes no room on the disk."""

    def change(run_folder: Path, outside: Path) -> None:
        _remove(run_folder / name)
        with (run_folder / name).open("wb") as file:
            file.truncate(num_bytes)

    return change


def put_endless_and_seal_it(run_folder: Path, outside: Path) -> None:
    name = "state/d/endless"
    put_endless(f"checkpoints/2/{name}")(run_folder, outside)
    reseal(run_folder / "checkpoints" / "2", lambda record: record["files"].update({name: [1 << 40, "0" * 64]}))


def put_text(name: str, text: bytes) -> Craft:
    def change(run_folder: Path, outside: Path) -> None:
        _remove(run_folder / name)
        (run_folder / name).write_bytes(text)

    return change


def put_folder(name: str) -> Craft:
    def change(run_folder: Path, outside: Path) -> None:
        _remove(run_folder / name)
        (run_folder / name).mkdir()

    return change


def nest_folders(name: str) -> Craft:
    """Folders in folders, 1,100 deep: deeper than Python calls itself."""

    def change(run_folder: Path, outside: Path) -> None:
        here = os.open(run_folder, os.O_RDONLY)
        try:
            for part in [*Path(name).parts, *["d"] * 1100]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=here)
                inner = os.open(part, os.O_RDONLY, dir_fd=here)
                os.close(here)
                here = inner
        finally:
            os.close(here)

    return change


def remove_nest(folder: Path) -> None:
    """Remove a folder of any depth: Python's own rmtree calls itself for each, and pytest's cleaning up with it."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _remove(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
