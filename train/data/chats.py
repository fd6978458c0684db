"""Tokenize the chats of a corpus, with a mask of what the assistant wrote: answers alone count as targets.

The chat template is that beside the tokenizer, as a model's folder has it. Read `corpus.py` next.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...hub.chat.template import TEMPLATE, ChatTemplate, RenderedChat, load_chat_template
from ...hub.chat.tokens import ChatTokens, encode_chats
from ...hub.tokenizer import ModelTokenizer
from ...meshes import DataError, ServeError
from .records.chats import read_chats
from .records.damage import Damage
from .texts import check_total

_BATCH = 256
"""Chats that are tokenized at a time."""


@dataclass(frozen=True, kw_only=True)
class Chats:
    """The tokens [n] of chats one after another, which of them are answers, uint8 [n], and where chats end, int64."""

    tokens: np.ndarray
    mask: np.ndarray
    ends: np.ndarray


def read_template(tokenizer: ModelTokenizer) -> ChatTemplate:
    """Return the chat template beside a tokenizer.

    Raises:
        DataError: there is none, or it is broken.
    """
    folder = tokenizer.file.parent
    try:
        template = load_chat_template(folder)
    except ServeError as error:
        raise DataError(error.problem, fix=f"correct it in {folder}.") from None
    if template is None:
        raise DataError(
            f"{folder} has no chat template, so messages have no text there.",
            fix=f"put one into {folder / TEMPLATE}, or take the tokenizer of a model that chats.",
        )
    return template


def load_chats(files: Sequence[Path], *, field: str, tokenizer: ModelTokenizer, damage: Damage) -> Chats:
    """Return the tokens of all chats of files.

    Raises:
        DataError: a file cannot be read, or there are too many bytes for the memory.
    """
    template, total, parts = read_template(tokenizer), 0, list[ChatTokens]()
    for file in files:
        chats = read_chats(file, field=field, template=template, damage=damage)
        for text, tokens in tokenize_chats(chats, tokenizer):
            total += len(text)
            check_total(total, files, largest=file)
            parts.append(tokens)
    sizes = np.array([part.ids.size for part in parts], np.int64)
    return Chats(
        tokens=np.concatenate([part.ids for part in parts] or [np.empty(0, np.uint16)]),
        mask=np.concatenate([part.mask for part in parts] or [np.empty(0, np.uint8)]),
        ends=np.cumsum(sizes) - 1,
    )


def tokenize_chats(chats: Iterable[RenderedChat], tokenizer: ModelTokenizer) -> Iterator[tuple[str, ChatTokens]]:
    """Yield text and tokens of chats, some of them in memory at a time."""
    batch: list[RenderedChat] = []
    for chat in chats:
        batch.append(chat)
        if len(batch) == _BATCH:
            yield from _encode(batch, tokenizer)
            batch = []
    yield from _encode(batch, tokenizer)


def _encode(batch: Sequence[RenderedChat], tokenizer: ModelTokenizer) -> Iterator[tuple[str, ChatTokens]]:
    return zip([chat.text for chat in batch], encode_chats(batch, tokenizer), strict=True)
