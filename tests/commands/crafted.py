"""Model folders that nobody should have made: a grammar of damage, drawn by a seed.

A folder begins as a golden with a tokenizer; one to three of its files are then replaced, or changed within. Beside it
lies a file that nothing may read, `secret`, and a named pipe that would hang whoever opens it, `trap`.
"""

import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ..hub.hub import GOLDEN, MODELS

_READ = ("config.json", "hf_config.json", "tokenizer.json", "model.safetensors")
SECRET = "what nobody may read 4711"

Draw = random.Random


def craft(folder: Path, seed: int) -> list[str]:
    """Make a folder of a seed and return what was done to it."""
    draw = Draw(seed)
    shutil.copytree(GOLDEN / draw.choice(sorted(MODELS)), folder)
    add_tokenizer(folder)
    set_trap(folder.parent)
    return damage(folder, draw)


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 64 ids that the goldens have, with all that may lie beside one."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + number): number for number in range(64)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\"", "bos_token": "!"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "\\""}')
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (folder / name).write_text("{}")


def set_trap(place: Path) -> None:
    """Put a secret, and a pipe without a writer, where links of the folder can lead."""
    (place / "secret").write_text(SECRET)
    # Read, it would get another access time even where those are updated sparingly.
    os.utime(place / "secret", (1, 2))
    if not (place / "trap").exists():
        os.mkfifo(place / "trap")


def damage(folder: Path, draw: Draw) -> list[str]:
    """Replace or change one to three files and return how."""
    told = []
    files = sorted(folder.iterdir())
    # Those from which most is read, in a third of the folders alone.
    read = [file for file in files if file.suffix == ".safetensors" or file.name.startswith(_READ)]
    among = draw.choice((files, read, read))
    for file in draw.sample(among, min(len(among), draw.choice((1, 1, 2, 3)))):
        kinds = [_replace, _replace, _spoil_bytes]
        kinds += [_spoil_json] * 4 if file.suffix == ".json" else []
        kinds += [_spoil_header] * 4 if file.suffix == ".safetensors" else []
        kinds += [_spoil_tokenizer] * 4 if file.name == "tokenizer.json" else []
        kinds += [_spoil_index] * 3 if file.name.endswith("index.json") else []
        told.append(f"{file.name}: {draw.choice(kinds)(file, draw)}")
    return told


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(10 << 30)


def _sparse_after(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(10 << 30)


def _socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # its name may be no longer than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(file.name)
    finally:
        os.chdir(here)


_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
REPLACEMENTS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda _: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a secret": lambda file: file.symlink_to("../secret"),
    "a link to the secret's place": lambda file: file.symlink_to((file.parent.parent / "secret").absolute()),
    "a link to a trap": lambda file: file.symlink_to("../trap"),
    "a link by folders": lambda file: file.symlink_to("../model/../secret"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to zeros": lambda file: file.symlink_to("/dev/zero"),
    "a link to noise": lambda file: file.symlink_to("/dev/urandom"),
    "a link to a terminal": lambda file: file.symlink_to("/dev/tty"),
    "a link to nowhere": lambda file: file.symlink_to("nowhere"),
    "a link to a neighbour": lambda file: file.symlink_to("config.json"),
    "a socket": _socket,
    "a sparse file": _sparse,
    "an empty file": Path.touch,
    "a pointer": lambda file: file.write_text(_POINTER),
    "zeros": lambda file: file.write_bytes(bytes(1 << 20)),
    "escapes": lambda file: file.write_text('{"model_type": "\x1b[2J\x1b]0;pwned\x07"}'),
    "deep lists": lambda file: file.write_text("[" * 100_000),
    "deep tables": lambda file: file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "a list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "a long number": lambda file: file.write_text("9" * 10_000),
}


def _replace(file: Path, draw: Draw) -> str:
    name = draw.choice(sorted(REPLACEMENTS))
    file.unlink()
    REPLACEMENTS[name](file)
    return name


def _spoil_bytes(file: Path, draw: Draw) -> str:
    content = bytearray(file.read_bytes())
    how = draw.choice(("cut", "doubled", "bits", "mark", "utf-16", "sparse behind"))
    if how == "sparse behind":
        _sparse_after(file)
        return how
    if how == "bits":
        for _ in range(draw.choice((1, 8, 64))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    spoilt = {
        "cut": bytes(content[: draw.randrange(len(content))]),
        "doubled": bytes(content * 2),
        "bits": bytes(content),
        "mark": b"\xef\xbb\xbf" + bytes(content),
        "utf-16": content.decode("latin-1").encode("utf-16"),
    }
    file.write_bytes(spoilt[how])
    return how


RAW = "\N{SNOWMAN}"
"""Stands for text that json would not write."""

ODD_TEXTS = (
    "1e999",
    "-1e999",
    "NaN",
    "-Infinity",
    "1e-400",
    "1" * 4_000,
    "0.1",
    "1.0",
    "-0",
    "٣",
    "[[[]]]",
    '{"a": 1}',
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, -(2**70), 1e308, -1e-9,
    1_000_000_000, "", "0", "llama", "x" * 20_000, "\x1b[31mred\x1b[0m", "\x00", "\u202eabc", "\ud800", "../secret",
    [], {}, [0] * 50_000, [None], [[1, [2]]], {"type": "BPE"}, {"a" * 5_000: 1}, {"content": 5},
)  # fmt: skip


def _spoil_json(file: Path, draw: Draw) -> str:
    """Change values anywhere in a JSON file, or say one of its keys twice."""
    values = json.loads(file.read_text())
    told = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        place: Any = values
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
                place = inner
                continue
            odd = RAW if draw.random() < 0.25 else deepcopy(draw.choice(ODD_VALUES))
            place[key] = odd
            told.append(f"{key}={str(odd)[:20]!r}")
            break
    text = json.dumps(values)
    while json.dumps(RAW) in text:
        text = text.replace(json.dumps(RAW), draw.choice(ODD_TEXTS), 1)
    if draw.random() < 0.1 and text.endswith("}"):
        key = draw.choice(sorted(values)) if values else "a"
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw.choice(ODD_VALUES))}}}"
        told.append(f"{key} twice")
    file.write_text(text, encoding="utf-8")
    return ", ".join(told)


_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TOKENIZERS: tuple[dict[str, Any], ...] = (
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "####"}},
    {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
    {"model": {"type": "WordLevel", "vocab": {"A": 64, "B": 10**9}, "unk_token": "A"}},
    {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "A"}},
    {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
    {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7}},
    {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "\x1b[2J", "max_input_chars_per_word": 2**63}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "A*"}, "content": "B" * 10_000}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": _SPLIT | {"pattern": {"Regex": "("}}},
    {"pre_tokenizer": _SPLIT | {"pattern": {"Regex": "(A|A)*(A+)+$"}}},
    {"pre_tokenizer": _SPLIT | {"pattern": {"Regex": "((A{1,1000}){1,1000}){1,1000}"}}},
    {"post_processor": _TEMPLATE | {"single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}]}},
    {"post_processor": _TEMPLATE | {"single": [{"Sequence": {"id": "B", "type_id": 0}}]}},
    {"decoder": {"type": "Strip", "content": "A", "start": 2**40, "stop": 2**40}},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}},
    {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
)  # fmt: skip
"""Parts of a tokenizer.json that the library reads and fails on, at once or later."""


def _spoil_tokenizer(file: Path, draw: Draw) -> str:
    number = draw.randrange(len(TOKENIZERS))
    file.write_text(json.dumps(json.loads(file.read_text()) | TOKENIZERS[number]))
    return f"tokenizer {number}"


ODD_HOMES = (
    "../secret",
    "/dev/zero",
    "../trap",
    "config.json",
    "a/../../secret",
    "",
    ".",
    "..",
    "\x00",
    "x" * 300,
    "\x1b[2J",
)


def _spoil_index(file: Path, draw: Draw) -> str:
    values = json.loads(file.read_text())
    homes = values["weight_map"]
    how = draw.choice(("one", "all", "many", "none", "trap", "itself"))
    names = sorted(homes) if how in ("all", "many", "trap", "itself") else draw.sample(sorted(homes), 2)
    for number, name in enumerate(names):
        if how == "many":
            homes[name] = f"{number}.safetensors"
        elif how == "none":
            del homes[name]
        else:
            homes[name] = {"trap": "trap.safetensors", "itself": file.name}.get(how, draw.choice(ODD_HOMES))
    if how == "trap":
        os.mkfifo(file.parent / "trap.safetensors")
    if how == "many":
        homes |= {f"more.{number}": f"more-{number}.safetensors" for number in range(5_000)}
    file.write_text(json.dumps(values))
    return f"homes of {how}"


def _spoil_header(file: Path, draw: Draw) -> str:
    """Change what a safetensors file says of its tensors, or of how much it says."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw.choice([one for one in header if one != "__metadata__"])
    entry = header[name]
    odd = draw.choice((-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 2**70, 1.5, None, "1", True, [], 10**30))
    how = draw.choice(
        ("offset", "shape", "dtype", "overlap", "metadata", "length", "padding", "rename", "twice", "many")
    )
    if how == "offset":
        entry["data_offsets"][draw.randrange(2)] = odd
    elif how == "shape":
        entry["shape"] = draw.choice(
            (odd, [odd], [odd, odd], [*entry["shape"], 1], entry["shape"][::-1], [0], [2**40] * 3)
        )
    elif how == "dtype":
        entry["dtype"] = draw.choice(("F64", "I8", "F8_E4M3", "BOOL", "F128", "", odd, "F32\x1b[2J"))
    elif how == "overlap":
        entry["data_offsets"] = [0, len(data)]
    elif how == "metadata":
        header["__metadata__"] = draw.choice((odd, {"a": odd}, {"format": "\x1b[2J"}, {"a": "b" * 100_000}))
    elif how == "rename":
        header[draw.choice(("", "\x1b[31m", "x" * 10_000, f"model.{name}", "lm_head.weight"))] = header.pop(name)
    elif how == "many":
        header |= {f"t{number}": entry for number in range(50_000)}
    text = json.dumps(header)
    if how == "twice":
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entry | {'shape': [1]})}}}"
    if how == "padding":
        text += " " * draw.choice((1, 1 << 20, 99_000_000, 101_000_000))
    length = draw.choice((0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, len(content))) if how == "length" else len(text)
    file.write_bytes(struct.pack("<Q", length) + text.encode() + data)
    return f"header, {how}"
