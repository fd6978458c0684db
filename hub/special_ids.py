"""Find the token ids that begin and end a text, in the files beside a tokenizer.

As in transformers 5, generation_config.json is preferred to config.json, and special_tokens_map.json to
tokenizer_config.json. Read `tokenizer.py` next.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..meshes import DataError
from .folder import read_json

ORIGIN = "hf_config.json"
"""Name in a run folder of the config.json that its model was imported with."""

_MODEL_FILES = ("generation_config.json", "config.json", ORIGIN)
_TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The special token ids of a model.

    Args:
        end_id: id that ends a document in training; None if no file names one.
        stop_ids: ids that end an answer.
        begin_id: id to use as the prompt if a text has no tokens; None if no file names one.
        warnings: a line for every two files that differ.
    """

    end_id: int | None
    stop_ids: tuple[int, ...]
    begin_id: int | None
    warnings: tuple[str, ...]


def find_special_ids(folder: Path, tokenizer: Tokenizer) -> SpecialIds:
    """Return the special ids in the files beside a tokenizer; ids that the tokenizer does not have are left out.

    Raises:
        DataError: a file is not JSON, not a regular file, or a link out of the folder.
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
    """Return the ids under a key, by file, the preferred file first."""
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
            except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
                number = None
            return () if number is None else (number,)
    return ()


def _is_known(number: int, tokenizer: Tokenizer) -> bool:
    return 0 <= number < 2**32 and tokenizer.id_to_token(number) is not None


def _read(folder: Path, name: str) -> dict[str, Any]:
    values = read_json(folder, name, error=DataError)
    return values if isinstance(values, dict) else {}
