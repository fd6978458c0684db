"""A thousand wrong configs: each is a config after all, or an error that names the key; never a traceback."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trellax.configs import check_run, load_config
from trellax.configs.run_config import config_keys
from trellax.meshes import TrellaxError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
NUM_MUTATIONS = 1_000
KEYS = config_keys()

VALUES = (
    *("0", "-1", "1", "3", "7", "1000000007", "99999999999999999999999999", "-0.0", "0.5", "1e400", "1e-400"),
    *("nan", "-inf", "true", "false", '""', '"auto"', '"1"', '"words"', '"\\u0000"', '"../.."', '"💥"', "'''a\nb'''"),
    *("[]", "[1, 2]", "[[1], [2]]", '["a", 1]', "{}", "{a = 1}", "1979-05-27", "07:32:00", "0xff", "1_000"),
)
BROKEN = ("", "=", "[1,", '"', "{", "1e", "yes", "None", "0777", "\\", "\x07")

Mutation = Callable[[str, random.Random], tuple[str, str, list[str]]]
"""Config text -> (what must be named where it is refused, new text, command line)."""


def assignments(text: str) -> list[tuple[int, str, str]]:
    """Return (line number, section, key) of every assignment."""
    found, section = [], ""
    for number, line in enumerate(text.splitlines()):
        if match := re.match(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"(\w+) *=", line):
            found.append((number, section, match[1]))
    return found


def with_line(text: str, number: int, line: str | None) -> str:
    lines = text.splitlines()
    lines[number : number + 1] = [] if line is None else [line]
    return "\n".join(lines) + "\n"


def change_value(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    number, _, key = rng.choice(assignments(text))
    return key, with_line(text, number, f"{key} = {rng.choice(VALUES)}"), []


def break_value(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    number, _, key = rng.choice(assignments(text))
    # What is no TOML has no keys: the file and the line are named.
    # An open list ends a line later.
    return f":({number + 1}|{number + 2})", with_line(text, number, f"{key} = {rng.choice(BROKEN)}"), []


def add_key(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    section, _, key = rng.choice(KEYS).partition(".")
    text = text if f"[{section}]" in text else f"{text}\n[{section}]\n"
    here = {name for _, its, name in assignments(text) if its == section}
    if key in here:
        return change_value(text, rng)
    return key, text.replace(f"[{section}]\n", f"[{section}]\n{key} = {rng.choice(VALUES)}\n", 1), []


def misspell_key(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    number, _, key = rng.choice(assignments(text))
    place = rng.randrange(len(key))
    other = rng.choice([key[:place] + key[place + 1 :], f"{key}s", key[::-1], key.upper(), f"x{key}"]) or "x"
    line = text.splitlines()[number]
    return other, with_line(text, number, line.replace(key, other, 1)), []


def drop_key(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    number, _, key = rng.choice(assignments(text))
    return key, with_line(text, number, None), []


def rename_section(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    section = rng.choice(re.findall(r"^\[(\w+)\]", text, flags=re.MULTILINE))
    other = rng.choice([section[:-1] or "x", f"{section}s", "other", section.upper()])
    # The missing section is named, or the one that is unknown.
    return f"({section}|{other})", text.replace(f"[{section}]", f"[{other}]"), []


def repeat_key(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    number = rng.choice(assignments(text))[0]
    line = text.splitlines()[number]
    return f":{number + 2}", with_line(text, number, f"{line}\n{line}"), []


def override(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    name = rng.choice(KEYS)
    return name.partition(".")[2], text, [f"--{name}", rng.choice((*VALUES, *BROKEN)).strip("\"'")]


def override_unknown(text: str, rng: random.Random) -> tuple[str, str, list[str]]:
    name = rng.choice(KEYS)
    place = rng.randrange(len(name))
    other = name[:place] + rng.choice("xyz_-.") + name[place:]
    return other, text, [f"--{other}", "1"]


MUTATIONS: tuple[Mutation, ...] = (
    *(change_value, change_value, break_value, add_key, add_key, misspell_key, drop_key),
    *(rename_section, repeat_key, override, override, override_unknown),
)


def judge(path: Path, words: list[str], *, wanted: str) -> str:
    """Return what is wrong with what the reader says, or nothing."""
    try:
        config = load_config(path, words)
        # As many devices as it asks for: how many there are is not the config's mistake.
        check_run(config, num_devices=math.prod(abs(size) for size in config.mesh.sizes.values()))
    except TrellaxError as error:
        return "" if re.search(wanted.replace("-", "[-_]"), str(error)) else f"does not name {wanted}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("part", range(4))
def test_wrong_config_is_an_error_that_names_its_key(part: int, tmp_path: Path) -> None:
    failures: list[Any] = []
    for number in range(part * NUM_MUTATIONS // 4, (part + 1) * NUM_MUTATIONS // 4):
        rng = random.Random(number)
        text = rng.choice(CONFIGS).read_text(encoding="utf-8")
        mutation = rng.choice(MUTATIONS)
        wanted, mutated, words = mutation(text, rng)
        path = tmp_path / "run.toml"
        path.write_text(mutated, encoding="utf-8")
        if problem := judge(path, words, wanted=wanted):
            failures.append((number, mutation.__name__, words, problem[:400]))
    assert failures == []


ENCODINGS = {
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "latin-1": lambda text: text.replace("#", "# é", 1).encode("latin-1"),
    "zero byte": lambda text: text.encode() + b"\0",
    "cut letter": lambda text: text.encode() + b"# \xe2\x82",
    "nothing": lambda text: b"",
    "binary": lambda text: bytes(range(256)),
    "lone returns": lambda text: text.replace("\n", "\r").encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode(),
    "deep": lambda text: text.encode() + b"\n[data]\npaths = " + b"[" * 5_000,
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_file_of_another_encoding_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(ENCODINGS[name]((ROOT / "configs" / "tiny-dense.toml").read_text(encoding="utf-8")))
    assert judge(path, [], wanted=r"run\.toml|section is missing") == ""
