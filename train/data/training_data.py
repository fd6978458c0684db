"""Hold the batches of a run, for training and validation, and place them on the mesh."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...configs.run_config import RunConfig
from ...layers.context.places import order_chunks
from .batches import Batches
from .corpus import Corpus
from .preferences.pair_batches import PairBatches, PairValidation
from .prefetch import place_batch
from .shuffle_documents import shuffled_sources
from .validation_batches import ValidationBatches


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The batches of a run: host arrays [M, B, T] by index, placed as [M, B@data, T@context].

    num_context: context ranks, in whose order tokens are placed.
    """

    corpus: Corpus
    train: Batches | PairBatches
    validation: ValidationBatches | PairValidation
    sharding: jax.sharding.NamedSharding
    num_context: int = 1

    def train_batch(self, step: int) -> dict[str, jax.Array]:
        """Return the batch of a training step, placed on the devices.

        Raises:
            DataError: a file of the corpus is lost or changed.
        """
        return self._place(self.train[step])

    def validation_batches(self) -> Iterator[dict[str, jax.Array]]:
        """Yield the batches of one validation, the same at every validation.

        Raises:
            DataError: a file of the corpus is lost or changed.
        """
        return (self._place(batch) for batch in self.validation)

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        # Checked after the batch was read: a change that comes later is not part of it.
        self.corpus.check_files()
        # Targets are shifted and positions given: from here on the order of tokens is that of the ranks.
        ordered = {name: order_chunks(leaf, num_ranks=self.num_context) for name, leaf in batch.items()}
        return place_batch(ordered, self.sharding)


def make_training_data(
    config: RunConfig,
    corpus: Corpus,
    *,
    sharding: jax.sharding.NamedSharding,
    num_context: int = 1,
    first_sequence: int = 0,
    reference: np.ndarray | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> TrainingData:
    """Return the batches that a config cuts out of a corpus.

    Args:
        num_context: context ranks, `setup.sizes.context`.
        first_sequence: as for `Batches`.
        reference: of pairs of answers, the loss of each row by the reference.
        say: told when the held-out part has fewer sequences than `train.eval_batches` asks for.

    Raises:
        DataError: a part of the corpus has no full sequence, or a batch does not split into microbatches.
    """
    size, most = config.train.batch_size, config.train.eval_batches
    sizes = {"seq_len": config.data.seq_len, "batch_size": size, "microbatches": config.pipeline.microbatches}
    where: dict[str, Any] = {"seed": config.run.seed, "first_sequence": first_sequence}
    train: Batches | PairBatches
    validation: ValidationBatches | PairValidation
    if corpus.preferences is None:
        train = Batches(shuffled_sources(corpus, seed=config.run.seed), **sizes, **where)
        validation = ValidationBatches(corpus.validation_sources, **sizes, max_batches=most)
    else:
        assert reference is not None
        pairs, first = corpus.preferences.pairs, len(corpus.preferences.pairs) - corpus.preferences.num_held_out
        train = PairBatches(pairs, numbers=range(first), reference=reference, **sizes, **where)
        held_out = range(first, len(pairs))
        validation = PairValidation(pairs, numbers=held_out, reference=reference, **sizes, max_batches=most)
    asked, found = most * size, validation.num_sequences
    if found < asked:
        say(f"validation on all {found} held-out sequences: train.eval_batches asks for {asked}")
    return TrainingData(corpus=corpus, train=train, validation=validation, sharding=sharding, num_context=num_context)
