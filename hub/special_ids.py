"""Ids that begin and end the texts of a model: several files of its folder name some.

As in transformers 5, generation_config.json comes before config.json, and special_tokens_map.json before
tokenizer_config.json. Read `tokenizer.py` for the use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..meshes import DataError
from .folder import read_json

ORIGIN = "hf_config.json"
"""The config.json that a run folder's model came with."""

_MODEL_FILES = ("generation_config.json", "config.json", ORIGIN)
_TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """What ends a document in training, what ends an answer, and what begins a text of no token, if anything says so.

    `warnings` is where files differ, a line each.
    """

    end_id: int | None
    stop_ids: tuple[int, ...]
    begin_id: int | None
    warnings: tuple[str, ...]


def find_special_ids(folder: Path, tokenizer: Tokenizer) -> SpecialIds:
    """Return the ids that the files beside a tokenizer name, as far as the tokenizer has them.

    Raises:
        DataError: a file is no JSON, or none that a folder from others may hold.
    """
    ends, begins = _model_ids(folder, "eos_token_id", tokenizer), _model_ids(folder, "bos_token_id", tokenizer)
    own_ends = _tokenizer_ids(folder, "eos_token", tokenizer)
    first = next(iter(ends.values()), ())
    begin = next(iter(begins.values()), ()) or _tokenizer_ids(folder, "bos_token", tokenizer)
    warnings = [
        f"an answer ends with {list(first)} of {next(iter(ends))}, not with {list(ids)} of {name}"
        for name, ids in [*ends.items(), (f"the tokenizer's eos_token in {folder}", own_ends)]
        if not set(ids) <= set(first) and ends
    ]
    return SpecialIds(
        end_id=next(iter((*own_ends, *first)), None),
        stop_ids=tuple(dict.fromkeys(first or own_ends)),
        begin_id=next(iter(begin), None),
        warnings=tuple(warnings),
    )


def _model_ids(folder: Path, key: str, tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """The ids under a key by the file that has it, those files first that count first."""
    found = {}
    for name in _MODEL_FILES:
        value = _read(folder, name).get(key)
        ids = value if isinstance(value, list) else [value]
        known = tuple(one for one in ids if type(one) is int and _is_known(one, tokenizer))
        if known:
            found[name] = known
    return found


def _tokenizer_ids(folder: Path, key: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    for name in _TOKENIZER_FILES:
        token = _read(folder, name).get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            try:
                number = tokenizer.token_to_id(text)
            except UnicodeEncodeError:  # JSON may have half a character
                number = None
            return () if number is None else (number,)
    return ()


def _is_known(number: int, tokenizer: Tokenizer) -> bool:
    return 0 <= number < 2**32 and tokenizer.id_to_token(number) is not None


def _read(folder: Path, name: str) -> dict[str, Any]:
    values = read_json(folder, name, error=DataError)
    return values if isinstance(values, dict) else {}
