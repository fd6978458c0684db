"""Compute the loss of a model, from a run or from Hugging Face, on files of text or records, on any mesh."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...configs.check import check_run
from ...configs.run_config import RunConfig, config_from_dict
from ...hub.model_folder import ModelSource, open_model
from ...hub.run_params import Weights, check_weights
from ...layers import ModelConfig
from ...layers.context.places import order_chunks
from ...meshes import DataError, MeshSpec, build_mesh
from ...meshes.arguments import check_count
from ...meshes.build import visible_devices
from ...pipeline import PipelineParams, pipeline_loss
from ..checkpoints.initial_weights import weight_shapes
from ..checkpoints.layer_order import as_pipeline, params_in_stages
from ..data.in_turn import in_turn
from ..data.prefetch import place_batch
from ..state import Setup
from .file_tokens import FileTokens, cut_batches, tokenize_file

_SEQ_LEN = 1024
_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class FileLoss:
    """The loss of a model on a file, or on several together.

    num_tokens: tokens that were predicted, all but the first of a file.
    num_bytes: bytes of the texts in UTF-8.
    loss: nats per token.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits by which the model encodes a byte of the text, which compares models of different tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


def evaluate_files(
    folder: str | Path,
    files: Sequence[str | Path],
    *,
    mesh: MeshSpec | None = None,
    seq_len: int | None = None,
    batch_size: int = _BATCH_SIZE,
    field: str = "text",
    dtype: str | None = None,
    weights: Weights = "last",
) -> list[FileLoss]:
    """Return the loss of the model in a folder, a run's or Hugging Face's, on each file.

    A file is one stream of tokens, its documents with the special tokens that training puts around them. It is cut into
    sequences of `seq_len`, and each token but the first is predicted once, from those before it in its sequence.

    >>> evaluate_files("runs/notes", ["notes/a.txt"])[0].perplexity
    7.9...

    Args:
        files: text files, or files of records.
        mesh: sizes of the mesh; one device if left out.
        seq_len: 1,024 if left out, or what the model reads if that is less.
        batch_size: sequences at a time, rounded up to what the mesh needs.
        field: field of a record that holds its text.
        dtype: dtype to compute in, that of the model if left out.
        weights: which weights of a run, those of its last step or their average.

    Raises:
        TrellaxError: a file or the model cannot be read, or the model does not fit the mesh.
    """
    _check_arguments(batch_size, seq_len, weights)
    source, spec = open_model(folder, weights=weights), MeshSpec() if mesh is None else mesh
    setup = make_setup(source, spec, seq_len=seq_len, batch_size=batch_size, dtype=dtype)
    read = {"field": field, "vocab_size": setup.config.model.vocab_size}
    # All files are read before the weights: a mistake in the last one would cost the work on the others.
    found = [(str(file), tokenize_file(Path(file), source.tokenizer, **read)) for file in files]
    params = params_in_stages(setup, as_pipeline(source.read(weight_shapes(setup))))
    compute = _compile_loss(setup)
    return [_evaluate_file(name, own, setup, params, compute) for name, own in found]


def _check_arguments(batch_size: int, seq_len: int | None, weights: Weights) -> None:
    check_weights(weights)
    check_count("batch_size", batch_size, error=DataError)
    if seq_len is not None:
        check_count("seq_len", seq_len, error=DataError)


def sum_losses(losses: Sequence[FileLoss], *, name: str) -> FileLoss:
    """Return the loss of several files together, each token weighing the same."""
    num_tokens = sum(own.num_tokens for own in losses)
    return FileLoss(
        name=name,
        num_documents=sum(own.num_documents for own in losses),
        num_tokens=num_tokens,
        num_bytes=sum(own.num_bytes for own in losses),
        loss=sum(own.loss * own.num_tokens for own in losses) / num_tokens,
    )


def make_setup(
    source: ModelSource, spec: MeshSpec, *, seq_len: int | None, batch_size: int, dtype: str | None
) -> Setup:
    """Return what evaluates a model on a mesh.

    Raises:
        TrellaxError: sequences, model and mesh do not fit each other.
    """
    if (seq_len or 1) > source.config.max_tokens:
        raise DataError(
            f"sequences of {seq_len} tokens are longer than the model reads, {source.config.max_tokens}.",
            fix=f"set seq_len to {source.config.max_tokens} or less, or leave it out.",
        )
    devices = visible_devices()
    spec = spec.resolve(num_devices=len(devices)) if -1 in spec.sizes.values() else spec
    config = _make_config(source.config, spec, seq_len=seq_len, batch_size=batch_size, dtype=dtype)
    check_run(config, num_devices=spec.num_devices)
    setup = Setup(config, build_mesh(spec, devices=devices[: spec.num_devices]))
    setup.check()
    return setup


def _make_config(
    model: ModelConfig, spec: MeshSpec, *, seq_len: int | None, batch_size: int, dtype: str | None
) -> RunConfig:
    microbatches = spec.pipe
    rows = microbatches * spec.data
    values: dict[str, Any] = {
        "model": asdict(model) | ({} if dtype is None else {"dtype": dtype}),
        "data": {"source": "tokens", "paths": ["-"], "seq_len": seq_len or min(model.max_tokens, _SEQ_LEN)},
        "train": {"steps": 1, "batch_size": math.ceil(batch_size / rows) * rows},
        "optimizer": {"learning_rate": 1.0},
        "pipeline": {"microbatches": microbatches},
    }
    return config_from_dict(values).model_copy(update={"mesh": spec})


def _compile_loss(setup: Setup) -> Callable[..., jax.Array]:
    model = setup.model_without_added_losses

    def loss(params: PipelineParams, batch: Any) -> jax.Array:
        return pipeline_loss(model.fns, params=params, batch=batch, mesh=setup.mesh, schedule=setup.schedule)

    return jax.jit(loss)


def _evaluate_file(
    name: str, found: FileTokens, setup: Setup, params: PipelineParams, compute: Callable[..., jax.Array]
) -> FileLoss:
    shape, context = setup.batch_shapes["tokens"].shape, setup.sizes.context
    counts: list[int] = []

    def start() -> Iterator[jax.Array]:
        for batch, count in cut_batches(found.tokens, shape=(shape[0], shape[1], shape[2])):
            counts.append(count)
            ordered = {leaf: order_chunks(own, num_ranks=context) for leaf, own in batch.items()}
            yield compute(params, place_batch(ordered, setup.batch_sharding))

    losses = in_turn(start())
    total = float(np.dot(np.asarray(jax.device_get(losses), np.float64), counts))
    return FileLoss(
        name=name,
        num_documents=found.num_documents,
        num_tokens=sum(counts),
        num_bytes=found.num_bytes,
        loss=total / sum(counts),
    )
