"""Read records of prompt, chosen and rejected, as the pairs of rows that a model is trained on.

    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}

    row 2i    prompt chosen     the tokens of the answer count, those of the prompt do not
    row 2i+1  prompt rejected

Read `pair_batches.py` next.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ....configs.corpus_paths import find_files
from ....configs.run_config import DataSection
from ....hub.tokenizer import load_tokenizer
from ....meshes import DataError
from ..records.damage import Damage
from ..records.json_lines import read_json_lines
from ..records.records import record_kind
from ..records.tables import read_rows

FIELDS = ("prompt", "chosen", "rejected")
"""Fields of a record, all of them text."""

Encode = Callable[[str, str], tuple[list[int], list[int]]]
"""Function from a prompt and an answer to the ids of both."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of tokens, one after another: row r is tokens[starts[r] : starts[r + 1]], its first `prompts[r]` the prompt.

    Rows 2i and 2i + 1 are the chosen and the rejected answer of pair i.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts) // 2

    @property
    def num_rows(self) -> int:
        """Number of rows, two for each pair."""
        return len(self.prompts)

    def row(self, index: int, *, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens and targets int32[T] of a row, filled up with zeros, and which targets count, float32[T]."""
        ids = self.tokens[self.starts[index] : self.starts[index + 1]]
        tokens, targets = np.zeros((2, seq_len), np.int32)
        tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        counts = np.zeros(seq_len, np.float32)
        # The last token of the prompt predicts the first of the answer.
        counts[max(self.prompts[index] - 1, 0) : len(ids) - 1] = 1
        return tokens, targets, counts


@dataclass(frozen=True, kw_only=True)
class LoadedPairs:
    """The pairs of files, their hash, the largest id + 1, and a description; the last `num_held_out` are held out."""

    pairs: Pairs
    num_held_out: int
    sha256: str
    vocab_size_needed: int
    description: str


def load_pairs(data: DataSection) -> LoadedPairs:
    """Load the pairs that a config names; those that are longer than `data.seq_len` + 1 tokens are left out.

    Raises:
        DataError: a file is missing or has no such records, or fewer than two pairs are left.
    """
    files, damage, rows, num_long = find_files(data.paths), Damage(), [], 0
    encode = _make_encode(data)
    for texts in (texts for file in files for texts in _read_file(file, damage)):
        both = [encode(texts[0], answer) for answer in texts[1:]]
        if max(len(prompt) + len(answer) for prompt, answer in both) > data.seq_len + 1:
            num_long += 1
        else:
            rows += both
    damage.check()
    found = len(rows) // 2
    if found < 2:
        raise DataError(
            f"{len(files)} files in data.paths have {damage.num_records} pairs, of which {num_long} are longer than "
            f"data.seq_len + 1 = {data.seq_len + 1} tokens: {found} are left, and two are needed, one held out.",
            fix="use more records, or a longer data.seq_len.",
        )
    return _join(rows, data, note=f"{num_long:,} longer than data.seq_len left out" if num_long else str(damage))


def _join(rows: Sequence[tuple[list[int], list[int]]], data: DataSection, *, note: str) -> LoadedPairs:
    tokens = np.array([token for row in rows for part in row for token in part], np.uint32)
    starts = np.array([0, *accumulate(len(prompt) + len(answer) for prompt, answer in rows)], np.int64)
    prompts = np.array([len(prompt) for prompt, _ in rows], np.int64)
    held_out = min(max(1, round(len(rows) // 2 * data.val_fraction)), len(rows) // 2 - 1)
    counts = f"{len(rows) // 2:,} pairs of chosen and rejected, {tokens.size:,} tokens, {held_out:,} pairs held out"
    return LoadedPairs(
        pairs=Pairs(tokens=tokens, starts=starts, prompts=prompts),
        num_held_out=held_out,
        sha256=hashlib.sha256(b"".join(leaf.tobytes() for leaf in (tokens, starts, prompts))).hexdigest(),
        vocab_size_needed=256 if data.tokenizer == "bytes" else int(tokens.max()) + 1,
        description=f"{counts}, {note}" if note else counts,
    )


def _make_encode(data: DataSection) -> Encode:
    if data.tokenizer == "bytes":
        return lambda prompt, answer: (list(prompt.encode()), list(answer.encode()))
    tokenizer = load_tokenizer(data.tokenizer)
    end_id = data.end_id if data.end_id >= 0 else tokenizer.special.end_id
    ends = [] if end_id is None else [end_id]
    # Apart, so that the prompt has the same ids before both answers.
    return lambda prompt, answer: (tokenizer.encode_prompt(prompt), [*tokenizer.encode(answer), *ends])


def _read_file(file: Path, damage: Damage) -> Iterator[list[str]]:
    """Yield the texts of every record that is not damaged, in the order of FIELDS."""
    for place, values in _read_values(file, damage):
        wrong = [name for name, value in zip(FIELDS, values, strict=True) if not isinstance(value, str)]
        if wrong:
            damage.add(place, f"{' and '.join(wrong)}: no text")
        elif not (values[1] and values[2]):
            damage.add(place, "an answer is empty")
        else:
            damage.num_records += 1
            yield list(values)


def _read_values(file: Path, damage: Damage) -> Iterator[tuple[Any, Sequence[Any]]]:
    kind = record_kind(file)
    if kind is None:
        raise DataError(
            f"{file}: data.source='pairs' reads records, and this is no file of them by its name.",
            fix="name .jsonl, .parquet or .arrow files with the fields prompt, chosen and rejected.",
        )
    if kind == "lines":
        yield from read_json_lines(file, field=FIELDS, damage=damage)
        return
    for columns in zip(*(read_rows(file, field=name, kind=kind, holds="text") for name in FIELDS), strict=True):
        yield columns[0][0], [value for _, value in columns]
