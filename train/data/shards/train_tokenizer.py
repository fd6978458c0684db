"""Train a byte-level BPE tokenizer on a corpus, as GPT-2's is (Radford et al. 2019, section 2.2)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ....hub.tokenizer import TOKENIZER
from ....meshes import DataError
from ..records.damage import Damage
from ..texts import read_texts

END = "<|endoftext|>"
"""The token that ends a document, with id 0."""

_NUM_BYTES = 256


def train_tokenizer(files: Sequence[Path], *, out: Path, vocab_size: int, field: str, damage: Damage) -> int:
    """Write tokenizer.json and tokenizer_config.json into a folder, and return the size of the vocabulary.

    It may be smaller than `vocab_size`, if the corpus has fewer pairs to merge.

    Raises:
        DataError: the vocabulary does not hold all bytes, a file cannot be read, or the corpus is empty or damaged.
    """
    if vocab_size <= _NUM_BYTES:
        raise DataError(
            f"a vocabulary of {vocab_size} does not hold the {_NUM_BYTES} bytes and {END}.",
            fix=f"ask for {_NUM_BYTES + 1} or more, 32768 say.",
        )
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_texts = 0

    def texts() -> Iterator[str]:
        nonlocal num_texts
        for _, text in read_texts(files, field=field, damage=damage):
            num_texts += 1
            yield text.decode("utf-8", errors="replace")

    tokenizer.train_from_iterator(texts(), trainer)
    damage.check()
    if not num_texts:
        raise DataError("the corpus has no text.", fix="name files that hold something.")
    # Not by its own `save`, whose errors are no OSErrors.
    (out / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
