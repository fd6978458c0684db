"""Put the documents of a corpus into a random order before sequences are cut, so that neighbours come from anywhere.

Without it only sequences are shuffled, and a sequence that holds several short documents holds those that follow each
other in the files. The order is a function of the seed, so a run resumes exactly, on any mesh.
"""

from dataclasses import replace

import numpy as np

from .batches import TokenSource
from .corpus import Corpus
from .documents import Documents
from .joined_tokens import PermutedTokens


def shuffled_sources(corpus: Corpus, *, seed: int) -> tuple[TokenSource, ...]:
    """Return what a corpus trains on, its documents in another order if it says so; 16 bytes a document in memory."""
    if corpus.blend:
        # Another seed for each source, as in `Batches`.
        pairs = [(part, weight, (seed + i) % 2**32) for i, (part, weight) in enumerate(corpus.blend)]
        return tuple(replace(shuffled_sources(part, seed=own)[0], weight=weight) for part, weight, own in pairs)
    (source,) = corpus.train_sources
    if corpus.shuffled is None:
        return (source,)
    ends = corpus.shuffled.find_ends(corpus.train)
    permuted = PermutedTokens(corpus.train, ends=ends, order=np.random.default_rng(seed).permutation(ends.size))
    cut = None if source.documents is None else Documents(ends=permuted.ends)
    mask = None if corpus.mask is None else permuted.permute(corpus.mask[: corpus.train.size])
    return (replace(source, tokens=permuted, documents=cut, mask=mask),)
