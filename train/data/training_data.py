"""Hold the batches of a run, for training and validation, and place them on the mesh."""

from collections.abc import Callable, Iterator, Mapping
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

    sets: the batches of each further validation set, by its name.
    num_context: context ranks, in whose order tokens are placed.
    """

    corpus: Corpus
    train: Batches | PairBatches
    validation: ValidationBatches | PairValidation
    sets: Mapping[str, ValidationBatches]
    sharding: jax.sharding.NamedSharding
    num_context: int = 1

    def train_batch(self, step: int) -> dict[str, jax.Array]:
        """Return the batch of a training step, placed on the devices.

        Raises:
            DataError: a file of the corpus is lost or changed.
        """
        return self._place(self.train[step])

    def validation_batches(self, *, name: str = "") -> Iterator[dict[str, jax.Array]]:
        """Yield the batches of one validation, the same at every validation: of the held-out part, or of a set.

        Raises:
            DataError: a file of the corpus is lost or changed.
        """
        return (self._place(batch) for batch in (self.sets[name] if name else self.validation))

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
    own = {name: ValidationBatches(own.validation_sources, **sizes, max_batches=most) for name, own in corpus.sets}
    _say_short({"": validation, **own}, asked=most * size, say=say)
    placed: dict[str, Any] = {"sharding": sharding, "num_context": num_context}
    return TrainingData(corpus=corpus, train=train, validation=validation, sets=own, **placed)


def _say_short(
    found: Mapping[str, ValidationBatches | PairValidation], *, asked: int, say: Callable[[str], object]
) -> None:
    for what, batches in found.items():
        if batches.num_sequences < asked:
            those = f"sequences of {what}" if what else "held-out sequences"
            say(f"validation on all {batches.num_sequences} {those}: train.eval_batches asks for {asked}")
