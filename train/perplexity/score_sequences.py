"""Compute the log-likelihood of the last tokens of sequences, on any mesh, as benchmarks of language models ask for it.

    sequence    The sum of 2 and 2 is four          count = 1: the log-likelihood of `four`
    weights      0   0   0 0  0  0  1  .  .         of each target; padded behind to the length of the batch

Sequences are sorted by length, and those of about one length are padded to a power of two, so that few programs are
compiled. `evaluate_files.py` computes the loss of whole files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...hub.model_folder import ModelSource
from ...layers.context.places import order_chunks
from ...meshes import DataError, MeshSpec
from ...pipeline import PipelineParams, pipeline_loss
from ..checkpoints.initial_weights import weight_shapes
from ..checkpoints.layer_order import as_pipeline, params_in_stages
from ..data.prefetch import place_batch
from ..state import Setup
from .evaluate_files import make_setup

_SHORTEST = 32


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Token ids, of which the last `count` are scored; the one before them at least is their context."""

    tokens: tuple[int, ...]
    count: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """The log-likelihood of tokens, in nats, and whether each of them is the likeliest in its place."""

    logprob: float
    is_greedy: bool


class SequenceScorer:
    """Score sequences with a model on a mesh; the weights are read at once.

    >>> scorer = SequenceScorer(open_model("runs/quickstart"), mesh=MeshSpec(), batch_size=8)
    >>> scorer.score([Scored(tokens=(104, 105, 33), count=1)])
    [Score(logprob=-3.2..., is_greedy=False)]

    Args:
        batch_size: sequences at a time, rounded up to what the mesh needs.
        dtype: dtype to compute in, that of the model if left out.

    Raises:
        TrellaxError: the model cannot be read, or does not fit the mesh.
    """

    def __init__(self, source: ModelSource, *, mesh: MeshSpec, batch_size: int, dtype: str | None = None) -> None:
        self.max_tokens = source.config.max_tokens
        """Most tokens that the model reads: a sequence has one more, its last target."""
        self._make = lambda seq_len: make_setup(source, mesh, seq_len=seq_len, batch_size=batch_size, dtype=dtype)
        self._multiple, self._vocab_size = 2 * mesh.context, source.config.vocab_size
        setup = self._make(self._round(_SHORTEST))
        self._params = params_in_stages(setup, as_pipeline(source.read(weight_shapes(setup))))
        self._programs: dict[int, tuple[Setup, Callable[..., Any]]] = {}

    def score(self, sequences: Sequence[Scored]) -> list[Score]:
        """Return the score of each sequence.

        Raises:
            DataError: a sequence is too long, scores no token, or has an id that the model does not know.
        """
        for sequence in sequences:
            self._check(sequence)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens), reverse=True)
        found: dict[int, Score] = {}
        while order:
            setup, compute = self._program(self._round(len(sequences[order[0]].tokens) - 1))
            size = setup.config.train.batch_size
            chosen, order = order[:size], order[size:]
            batch = _make_batch([sequences[index] for index in chosen], setup)
            sums = jax.device_get(compute(self._params, batch))
            rows = zip(chosen, sums["logprob"].tolist(), sums["misses"].tolist(), strict=False)
            found |= {index: Score(logprob=logprob, is_greedy=not misses) for index, logprob, misses in rows}
        return [found[index] for index in range(len(sequences))]

    def _round(self, num_tokens: int) -> int:
        """Return the next power of two, or multiple of it that context ranks divide, that the model reads."""
        size = max(_SHORTEST, 1 << (num_tokens - 1).bit_length())
        size = -(-size // self._multiple) * self._multiple
        return max(num_tokens, min(size, self.max_tokens))

    def _program(self, seq_len: int) -> tuple[Setup, Callable[..., Any]]:
        if seq_len not in self._programs:
            setup = self._make(seq_len)
            self._programs[seq_len] = setup, _compile_scores(setup)
        return self._programs[seq_len]

    def _check(self, sequence: Scored) -> None:
        size, largest = len(sequence.tokens), max(sequence.tokens, default=0)
        if not 0 < sequence.count < size or size > self.max_tokens + 1:
            raise DataError(
                f"{sequence.count} of {size} tokens cannot be scored by a model that reads {self.max_tokens}.",
                fix=f"score 1 or more, with 1 or more before them, {self.max_tokens + 1} in all at most.",
            )
        if largest >= self._vocab_size or min(sequence.tokens) < 0:
            raise DataError(
                f"token id {largest} is unknown to the model, which has ids 0 to {self._vocab_size - 1}.",
                fix="take the model's own tokenizer.",
            )


def _compile_scores(setup: Setup) -> Callable[..., Any]:
    fns = setup.model.scores(setup.config.train.batch_size)

    def scores(params: PipelineParams, batch: Any) -> dict[str, jax.Array]:
        own = {"params": params, "batch": batch, "mesh": setup.mesh, "schedule": setup.schedule}
        return pipeline_loss(fns, **own, has_aux=True)[1].metrics

    return jax.jit(scores)


def _make_batch(sequences: Sequence[Scored], setup: Setup) -> dict[str, jax.Array]:
    """Return a batch [M, B, T], rows without a sequence and places behind one of weight 0."""
    shape, context = setup.batch_shapes["tokens"].shape, setup.sizes.context
    tokens = np.zeros((shape[0] * shape[1], shape[2] + 1), np.int32)
    weights = np.zeros((shape[0] * shape[1], shape[2]), np.float32)
    for row, sequence in enumerate(sequences):
        size = len(sequence.tokens)
        tokens[row, :size] = sequence.tokens
        weights[row, size - 1 - sequence.count : size - 1] = 1
    leaves = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    ordered = {name: order_chunks(leaf.reshape(shape), num_ranks=context) for name, leaf in leaves.items()}
    return place_batch(ordered, setup.batch_sharding)
