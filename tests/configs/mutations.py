"""Run files made wrong by the grammar: one or two places of a good file, or the whole of it.

A mutation returns what a refusal must name, as a regular expression, beside the file and the command line.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path

from trellax.configs.run_config import config_keys

from ..commands import grammar

KEYS = config_keys()
CONFIGS = {
    file.stem: file.read_text(encoding="utf-8") for file in (Path(__file__).parents[2] / "configs").glob("*.toml")
}

Case = tuple[str, bytes, list[str]]
"""What must be named, the file, and overrides."""

Mutation = Callable[[str, random.Random], tuple[str, str]]
"""Text of a run file -> (what must be named, new text)."""


def draw_case(rng: random.Random) -> Case:
    """Return a case: mostly one mutation, sometimes two, sometimes of the bytes or of the command line."""
    text = rng.choice(sorted(CONFIGS.values()))
    if rng.random() < 0.08:
        return _mutate_bytes(text, rng)
    wanted, overrides = [], []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.25:
            name, words = _draw_override(rng)
            overrides += words
        else:
            name, text = rng.choice(MUTATIONS)(text, rng)
        wanted.append(name)
    return "|".join(wanted), text.encode("utf-8", "surrogatepass"), overrides


def _assignments(text: str) -> list[tuple[int, str, str]]:
    """(line, section, key) of every assignment."""
    found, section = [], ""
    for number, line in enumerate(text.split("\n")):
        if match := re.match(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"(\w+) *=", line):
            found.append((number, section, match[1]))
    return found


def _put(text: str, number: int, *lines: str) -> str:
    old = text.split("\n")
    return "\n".join([*old[:number], *lines, *old[number + 1 :]])


def _named(*names: str) -> str:
    """These names, or the line of what is not TOML."""
    return "|".join([*(re.escape(name[:20]) for name in names if name), r"\.toml:\d+", r"\.toml has [\d,]+ bytes"])


def _change_value(text: str, rng: random.Random) -> tuple[str, str]:
    number, _, key = rng.choice(_assignments(text) or [(0, "", "model")])
    return _named(key), _put(text, number, f"{key} = {grammar.value(rng)}")


def _add_key(text: str, rng: random.Random) -> tuple[str, str]:
    section, _, key = rng.choice(KEYS).partition(".")
    lines = [f"[{section}]", f"{key} = {grammar.value(rng)}"]
    here = [name for _, its, name in _assignments(text) if its == section]
    if f"\n[{section}]\n" not in text:
        return _named(key, section), "\n".join([text, *lines, ""])
    if key in here:
        return _change_value(text, rng)
    return _named(key), text.replace(f"\n[{section}]\n", "\n" + "\n".join(lines) + "\n", 1)


def _add_strange_key(text: str, rng: random.Random) -> tuple[str, str]:
    number, section, _ = rng.choice(_assignments(text) or [(0, "", "model")])
    line = text.split("\n")[number]
    return _named(section), _put(text, number, line, f"{grammar.key(rng)} = {grammar.value(rng)}")


def _drop_line(text: str, rng: random.Random) -> tuple[str, str]:
    number, section, key = rng.choice(_assignments(text) or [(0, "", "model")])
    return _named(key, section), _put(text, number)


def _strange_header(text: str, rng: random.Random) -> tuple[str, str]:
    headers = re.findall(r"^\[(\w+)\]", text, flags=re.MULTILINE) or ["model"]
    name = rng.choice(headers)
    new = grammar.pick(
        rng,
        *(f"[[{name}]]", f"[{name}.{name}]", f"[{name}.sub]", f"[ {name} ]", f'["{name}"]', f"[{name}", f"{name}]"),
        *(f"[{name}]\n[{name}]", f"[{name.upper()}]", f"[{name}s]", "[]", "[[]]", f"[[{name}.x]]", f"[{name}] # é"),
        *(f"{name} = 1", f"{name} = []", f"{name} = {{}}", f"{name} = 1979-05-27", f"[x.{name}]", f"['{name}\\u0000']"),
        lambda r: f"[{grammar.key(r)}]",
    )
    return _named(name, name.upper(), *headers), text.replace(f"[{name}]", new, 1)


def _dotted(text: str, rng: random.Random) -> tuple[str, str]:
    section, _, key = rng.choice(KEYS).partition(".")
    new = grammar.pick(rng, f"{section}.{key}", f'{section}."{key}"', f"{section}.{key}.x", f"{section} . {key}")
    return _named(section, key), f"{new} = {grammar.value(rng)}\n{text}"


def _repeat_line(text: str, rng: random.Random) -> tuple[str, str]:
    number, _, key = rng.choice(_assignments(text) or [(0, "", "model")])
    line = text.split("\n")[number]
    return _named(key), _put(text, number, *[line] * rng.choice((2, 3, 1_000)))


def _stray_line(text: str, rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(text.count("\n") + 1)
    line = grammar.pick(rng, grammar.broken_text, grammar.value, grammar.key, "# \x00", "#" + "é" * 10_000, "\r", "\f")
    return _named(), _put(text, number, line)


MUTATIONS: tuple[Mutation, ...] = (
    *[_change_value] * 5,
    *[_add_key] * 5,
    *(_add_strange_key, _drop_line, _strange_header, _strange_header, _dotted, _repeat_line, _stray_line),
)


def _draw_override(rng: random.Random) -> tuple[str, list[str]]:
    name = rng.choice(KEYS)
    section, _, key = name.partition(".")
    option = grammar.pick(
        rng,
        *[f"--{name}"] * 8,
        *(f"--{section}", f"--{section}.", f"--.{key}", f"--{name}.x", f"--{name}s", f"--{name.upper()}"),
        *(f"--{name.replace('_', '-')}", f"--x.{key}", "--.", "--a.b.c", f"--{section}.{key[:-1]}", f"--{name}\0"),
    )
    word = grammar.word(rng) if rng.random() < 0.8 else grammar.value(rng).replace("\0", "")
    option = option.replace("\0", "")
    shape = rng.random()
    words = [f"{option}={word}"] if shape < 0.4 else [option, word] if shape < 0.9 else [option]
    if rng.random() < 0.1:
        words *= 2
    # A value that looks like an option is one.
    names = [key, key.replace("_", "-"), option, option.replace("-", "_"), *(w[:20] for w in words if w[:2] == "--")]
    return "|".join(map(re.escape, names)), words


def _mutate_bytes(text: str, rng: random.Random) -> Case:
    raw = text.encode()
    place = rng.randrange(len(raw))
    new = rng.choice(
        (
            raw[:place] + bytes([rng.randrange(256)]) + raw[place:],
            raw[:place],
            raw[place:],
            raw[:place] + b"\0" * 10 + raw[place:],
            text.encode("utf-8-sig"),
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.replace("#", "# é").encode("latin-1"),
            text.replace("\n", "\r\n").encode(),
            text.replace("\n", "\r").encode(),
            raw * 2,
            raw + b"#" * 2_000_000,
            raw + b"\n" * 200_000,
            rng.randbytes(200),
            b"",
            b"\n",
            b"{}",
            b"[" * 100_000,
            b"a." * 50_000 + b"a = 1",
            b"[" + b"a." * 50_000 + b"a]",
        )
    )
    return r"\.toml|section", new, []
