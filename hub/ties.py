"""Whether the files of a model agree that its output table is its embedding.

config.json says so by `tie_word_embeddings`; the files may hold an `lm_head.weight` of its own all the same, trained
apart. What is in the files counts then, as in transformers 5. Read `read.py` next.
"""

from pathlib import Path

import numpy as np

from ..meshes import WeightsError
from .names import NAMINGS
from .tensor_files import FLOATS, TensorFiles, open_tensor_files

_BLOCK_BYTES = 64 << 20


def has_own_head(folder: str | Path, architecture: str) -> bool:
    """Return whether the files hold an output table of the embedding's shape and of other values.

    What keeps the files from being read is left to whoever reads them: then the answer is no. Reads both tables, where
    both are there.
    """
    naming = NAMINGS[architecture]
    try:
        files = open_tensor_files(folder)
    except WeightsError:
        return False
    table = naming.homes["embed.table"].name
    names = [name for name in (naming.prefix + table, table) if name in files.shapes]
    if not names or naming.head not in files.shapes:
        return False
    shapes = {files.shapes[naming.head], files.shapes[names[0]]}
    are_readable = {files.dtypes[naming.head], files.dtypes[names[0]]} <= set(FLOATS)
    # Tables of two shapes, or of other types, are refused later.
    if len(shapes) > 1 or len(shapes.pop()) != 2 or not are_readable:
        return False
    return not _are_equal(files, naming.head, names[0])


def _are_equal(files: TensorFiles, one: str, other: str) -> bool:
    num_rows, num_columns = files.shapes[one]
    # Eight bytes are what the widest type has.
    size = max(1, _BLOCK_BYTES // (8 * max(num_columns, 1)))
    for start in range(0, num_rows, size):
        index = (slice(start, min(start + size, num_rows)), slice(0, num_columns))
        if not np.array_equal(files.read(one, index), files.read(other, index)):
            return False
    return True
