"""A tokenizer.json whose tokens are bytes, for other programs that read a model trained on bytes.

It is a byte-level BPE without merges: a text becomes its bytes, each written as a printable letter (Radford et al.
2019, section 2.2), and the id of a letter is its byte.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .folder import find_file
from .special_ids import ORIGIN
from .tokenizer import TOKENIZER

NUM_BYTES = 256


def reads_bytes(folder: Path, *, data: Mapping[str, Any], vocab_size: int) -> bool:
    """Return whether the tokens of the model in a run folder are bytes.

    Args:
        data: the section `data` of its config.
    """
    is_trained_so = data.get("source", "stdlib") != "tokens" and data.get("tokenizer", "bytes") == "bytes"
    has_files = any(find_file(folder, name) for name in (TOKENIZER, ORIGIN))
    return is_trained_so and not has_files and vocab_size >= NUM_BYTES


def write_byte_tokenizer(folder: Path) -> list[Path]:
    """Write tokenizer.json and tokenizer_config.json into a folder, and return their paths."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    texts = {TOKENIZER: byte_tokenizer().to_str(), "tokenizer_config.json": json.dumps(config) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are bytes.

    >>> byte_tokenizer().encode("hé").ids
    [104, 195, 169]
    """
    tokenizer: Any = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """Return the letter of each byte: its own of Latin-1 where that is printable, else the next one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte if byte in printable else next(free)) for byte in range(NUM_BYTES)]
