"""Tokenize chats, with a mask of the tokens that the assistant wrote, as transformers does.

text    <user>2 + 2?</user><assistant>4</assistant>
tokens  5 17 9 17 8 6 7 21 6
mask    0  0 0  0 0 0 0  1 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..tokenizer import ModelTokenizer
from .template import RenderedChat


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """The token ids [n] of a chat, and which of them the assistant wrote, uint8 [n] of 0 and 1."""

    ids: np.ndarray
    mask: np.ndarray


def encode_chats(chats: Sequence[RenderedChat], tokenizer: ModelTokenizer) -> list[ChatTokens]:
    """Return the tokens of chats; a token that lies across the start of an answer belongs to it.

    The template writes all special tokens, so none are added.

    Raises:
        DataError: the tokenizer has no token for a part of a text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encoded = tokenizer.encode_places([chat.text for chat in chats])
    return [
        ChatTokens(ids=np.array(ids, dtype), mask=_mask(places, chat.spans))
        for (ids, places), chat in zip(encoded, chats, strict=True)
    ]


def _mask(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens overlap a span; both are in order."""
    (starts, ends), (first, last) = (np.array(own, np.int64).reshape(-1, 2).T for own in (places, spans))
    # The first span that ends behind the start of a token is the only one that it may begin in.
    index = np.searchsorted(last, starts, side="right")
    begins = np.append(first, np.iinfo(np.int64).max)[index]
    return (ends > begins).astype(np.uint8)
