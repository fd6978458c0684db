"""Use what the index of prepared tokens says: where documents end, and which hash each shard has."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...configs.corpora.prepared import PreparedTokens, is_prepared
from ...configs.run_config import DataSection
from ...hub.tokenizer import TOKENIZER
from ...meshes import DataError
from .documents import Documents
from .hashed_file import HashedFile


def prepared_documents(folders: Sequence[PreparedTokens]) -> Documents:
    """Return where the documents of prepared folders end, one folder after another.

    Raises:
        DataError: the file of a shard's documents is broken.
    """
    end_ids = {folder.end_id for folder in folders}
    if len(end_ids) == 1 and (end_id := end_ids.pop()) is not None:
        return Documents(end_id=end_id)
    parts, start = [np.empty(0, np.int64)], 0
    for shard in (shard for folder in folders for shard in folder.shards):
        try:
            ends = np.load(shard.documents)
        except (OSError, ValueError, EOFError):
            ends = None
        if ends is None or ends.dtype != np.int64 or ends.ndim != 1 or (ends.size and ends[-1] >= shard.num_tokens):
            raise DataError(f"{shard.documents} is broken.", fix="prepare its folder again.")
        parts.append(ends + start)
        start += shard.num_tokens
    return Documents(ends=np.concatenate(parts))


def find_tokenizer(data: DataSection) -> str:
    """Return the tokenizer of a corpus: that of the config, or of the first path if it is a prepared folder."""
    if data.source == "tokens" and data.paths and (Path(data.paths[0]) / TOKENIZER).is_file():
        return data.paths[0] if is_prepared(data.paths[0]) else data.tokenizer
    return data.tokenizer


def check_shards(files: Sequence[HashedFile], folders: Sequence[PreparedTokens]) -> None:
    """Raise unless each shard, and each mask, has the hash that its index gives.

    Raises:
        DataError: a file has another hash, or a mask is lost.
    """
    shards = [shard for folder in folders for shard in folder.shards]
    expected = {shard.tokens: shard.sha256 for shard in shards}
    expected |= {shard.mask: shard.mask_sha256 for shard in shards if shard.mask}
    # Without its mask all tokens of a shard would count.
    if lost := expected.keys() - {file.path for file in files}:
        raise DataError(f"{min(lost)} is lost.", fix="bring the file back, or prepare its folder again.")
    for file in files:
        if expected.get(file.path, file.sha256) != file.sha256:
            raise DataError(
                f"{file.path}: its sha256 is {file.sha256[:12]}, and its index says {expected[file.path][:12]}.",
                fix="bring the file back, or prepare its folder again.",
            )
