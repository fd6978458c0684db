"""Tokenize one file of texts, and cut it into batches of sequences in which each token is predicted once.

tokens     a b c d e f g h          seq_len = 3
sequence 0 a b c -> b c d
sequence 1 d e f -> e f g
sequence 2 g . . -> h . .           padded, with weight 0
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...hub.text_stream import ByteTokenizer, Tokenizer
from ...hub.tokenized_text import decode_text
from ...hub.tokenizer import ModelTokenizer
from ...meshes import DataError
from ..data.records.damage import Damage
from ..data.texts import read_texts


@dataclass(frozen=True, kw_only=True)
class FileTokens:
    """The token ids [n] of a file, and the bytes of its texts."""

    tokens: np.ndarray
    num_documents: int
    num_bytes: int


def tokenize_file(file: Path, tokenizer: Tokenizer, *, field: str, vocab_size: int) -> FileTokens:
    """Return the tokens of a file as training gets them, but for an end token after the last document.

    Raises:
        DataError: the file cannot be read, has fewer than two tokens, or one that the model does not have.
    """
    damage = Damage()
    texts = [text for _, text in read_texts([file], field=field, damage=damage) if text]
    damage.check()
    if isinstance(tokenizer, ModelTokenizer):
        tokens = _encode(file, texts, tokenizer)
    else:
        assert isinstance(tokenizer, ByteTokenizer)
        ended = [text if text.endswith(b"\n") else text + b"\n" for text in texts[:-1]]
        tokens = np.frombuffer(b"".join([*ended, *texts[-1:]]), np.uint8).astype(np.int32)
    if tokens.size < 2:
        raise DataError(f"{file}: {tokens.size} tokens have none to predict.", fix="name a file with more text.")
    if tokens.max() >= vocab_size:
        raise DataError(
            f"{file}: it has token id {tokens.max()}, and the model knows ids 0 to {vocab_size - 1}.",
            fix="take the model's own tokenizer.",
        )
    return FileTokens(tokens=tokens, num_documents=len(texts), num_bytes=sum(map(len, texts)))


def _encode(file: Path, texts: list[bytes], tokenizer: ModelTokenizer) -> np.ndarray:
    decoded = [decode_text(str(file), text) for text in texts]
    ends = [] if tokenizer.special.end_id is None else [tokenizer.special.end_id]
    parts = [np.empty(0, np.int32)]
    for ids in tokenizer.encode_prompts(decoded):
        parts += [np.array(ids, np.int32), np.array(ends, np.int32)]
    # The end of the file is no end of a document that the text would show.
    return np.concatenate(parts[:-1] if len(parts) > 1 else parts)


def cut_batches(tokens: np.ndarray, *, shape: tuple[int, int, int]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yield batches of `tokens` and `targets` int32 and `weights` float32, [M, B, T], with how many count.

    The weights of a batch sum to 1.
    """
    microbatches, rows, seq_len = shape
    step = microbatches * rows * seq_len
    for start in range(0, tokens.size - 1, step):
        window = tokens[start : start + step + 1]
        count = window.size - 1
        padded = np.zeros(step + 1, np.int32)
        padded[: window.size] = window
        weights = np.where(np.arange(step) < count, 1 / count, 0).astype(np.float32)
        leaves = {"tokens": padded[:-1], "targets": padded[1:], "weights": weights}
        yield {name: leaf.reshape(shape) for name, leaf in leaves.items()}, count
