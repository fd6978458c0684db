"""Tokenize records of prompt, chosen and rejected, as the pairs of rows that a model is trained on.

    row 2i    prompt chosen     the tokens of the answer count, those of the prompt do not
    row 2i+1  prompt rejected

Read `pair_records.py` for the records, `pair_batches.py` next.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from ....configs.corpora.paths import find_files
from ....configs.run_config import DataSection
from ....hub.chat.answers import DamagedChatError
from ....hub.chat.preferences import encode_answers
from ....hub.chat.template import ChatTemplate
from ....hub.tokenizer import ModelTokenizer, load_tokenizer
from ....meshes import DataError
from ..chats import read_template
from ..records.damage import Damage
from .pair_records import ChatPair, TextPair, read_pairs

Row = tuple[list[int], list[int]]
"""The ids of a prompt, and of an answer to it."""


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
    files, damage, rows, num_long = find_files(data.paths), Damage(), list[Row](), 0
    for both in _read_rows(files, data, damage):
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


def _read_rows(files: Sequence[Path], data: DataSection, damage: Damage) -> Iterator[list[Row]]:
    """Yield the rows of every pair, chosen before rejected; damaged ones are counted."""
    encoder = _Encoder(data)
    for place, pair in (found for file in files for found in read_pairs(file, damage)):
        try:
            both = encoder.encode(pair)
        except DamagedChatError as error:
            damage.add(place, error.problem)
            continue
        if not all(answer for _, answer in both):
            damage.add(place, "an answer is empty")
            continue
        damage.num_records += 1
        yield both


def _join(rows: Sequence[Row], data: DataSection, *, note: str) -> LoadedPairs:
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


class _Encoder:
    """Tokenize pairs by the tokenizer of a config, chats by the template beside it."""

    def __init__(self, data: DataSection) -> None:
        self._data = data

    def encode(self, pair: TextPair | ChatPair) -> list[Row]:
        """Return the ids of prompt and answer, of both answers.

        Raises:
            DamagedChatError: these messages cannot be trained on.
            DataError: nor can any others, for want of a chat template.
        """
        if isinstance(pair, ChatPair):
            both = pair.chosen, pair.rejected
            return list(encode_answers(self._template, self._tokenizer, prompt=pair.prompt, answers=both))
        answers = pair.chosen, pair.rejected
        if self._data.tokenizer == "bytes":
            return [(list(pair.prompt.encode()), list(answer.encode())) for answer in answers]
        # Apart, so that the prompt has the same ids before both answers.
        prompt = self._tokenizer.encode_prompt(pair.prompt)
        return [(prompt, [*self._tokenizer.encode(answer), *self._ends]) for answer in answers]

    @cached_property
    def _tokenizer(self) -> ModelTokenizer:
        return load_tokenizer(self._data.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._data.tokenizer == "bytes":
            raise DataError(
                "messages need a chat template, which is beside a model's tokenizer; data.tokenizer='bytes' has none.",
                fix="set data.tokenizer to the folder of a model that chats.",
            )
        return read_template(self._tokenizer)

    @cached_property
    def _ends(self) -> list[int]:
        end_id = self._data.end_id if self._data.end_id >= 0 else self._tokenizer.special.end_id
        return [] if end_id is None else [end_id]
