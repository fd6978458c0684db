"""Read masks beside arrays of tokens: which tokens count as targets, such as the answers of a chat.

chats.npy        token ids [n]
chats.mask.npy   uint8 or bool [n]: 1 where a token counts as a target
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...meshes import DataError
from .hashed_file import HashedFile
from .joined_tokens import Tokens, join_tokens
from .token_files import map_files, scan_tokens

_SUFFIX = ".mask.npy"


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Whether each token of several files counts, [n], 0 or 1, and the files that say it."""

    counts: Tokens
    sha256: str
    mapped: tuple[HashedFile, ...] = ()


def is_mask(file: Path) -> bool:
    """Return whether a file is the mask of another, by its name."""
    return file.name.endswith(_SUFFIX)


def map_masks(files: Sequence[Path], *, dtype: np.dtype) -> Mask | None:
    """Return the masks of files of tokens, memory-mapped; None if no file has one, 1 for those that have none.

    Args:
        dtype: type of raw files of tokens.

    Raises:
        DataError: a mask has another size, another type, or other numbers than 0 and 1.
    """
    masks = {file: mask for file in files if (mask := file.with_suffix(_SUFFIX)).is_file()}
    if not masks:
        return None
    mapped = [HashedFile(mask) for mask in masks.values()]
    parts = []
    for file in files:
        size = map_files([file], dtype=dtype).size
        # A view of one number, however many tokens there are.
        own = _map_mask(masks[file], size=size) if file in masks else np.broadcast_to(np.uint8(1), size)
        parts.append(own)
    counts = join_tokens(parts)
    scan = scan_tokens(counts, files=mapped)
    if scan.largest > 1:
        names = ", ".join(str(mask) for mask in masks.values())
        raise DataError(f"{names}: a mask has {scan.largest}; it is 0 or 1.", fix="save it as uint8 of 0 and 1.")
    return Mask(counts=counts, sha256=scan.sha256, mapped=scan.mapped)


def _map_mask(file: Path, *, size: int) -> np.ndarray:
    try:
        mask = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # whatever numpy raises for a broken header
        raise DataError(f"{file}: this is no .npy array.", fix="write it with numpy.save.") from error
    if mask.dtype not in (np.uint8, np.bool_) or mask.shape != (size,):
        raise DataError(
            f"{file}: the mask is {mask.dtype}{list(mask.shape)}, beside {size} tokens.",
            fix=f"save it as uint8[{size}], 1 where a token counts.",
        )
    return mask.view(np.uint8)
