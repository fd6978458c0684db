"""Compute the minimum traffic of a training step, with which the traffic of compiled programs is compared.

Traffic is counted as in `../../programs/collectives.py`: bytes that the busiest device sends in a step, by mesh axes.
- Gradients are reduced over `data` once, in float32: 2 (d - 1) / d bytes per byte, whether as an all-reduce or as the
  reduce-scatter and all-gather of ZeRO.
- Tensor parallelism all-reduces an activation twice per layer forward and twice backward (Shoeybi et al. 2019,
  section 3). An all-reduce over t devices sends 2 (t - 1) / t of the array.
- Every boundary between stages on two ranks sends an activation forward and its gradient back.
- Embedding, head and loss are counted apart, in `_vocabulary`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ...layers import ModelConfig
from ...meshes import MeshSpec, PlanError
from ...meshes.arguments import check_count, check_fields
from ...pipeline.schedules import Vocab
from .device_params import block_params, vocabulary_params

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of a training step that determine its traffic; sequences are those of one microbatch on one data shard.

    >>> StepSizes(model=config, mesh=MeshSpec(data=2), num_microbatches=4, num_sequences=1, num_tokens=128).boundary
    65536

    Raises:
        PlanError: a size is below 1, or `vocab` is unknown.
    """

    model: ModelConfig
    mesh: MeshSpec
    num_microbatches: int
    num_sequences: int
    num_tokens: int
    num_chunks: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    vocab: Vocab = "ends"

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)

    @property
    def boundary(self) -> int:
        """Bytes of one microbatch's activation between two layers, in the compute dtype: x[b, T, D]."""
        return self.tokens * self.model.hidden_size * _ITEM_BYTES[self.model.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch on one data shard."""
        return self.num_sequences * self.num_tokens

    def layers_of(self, rank: int) -> int:
        """Layers of one pipeline rank, over all its chunks."""
        if self.layers_per_stage is None:
            return self.model.num_layers // self.mesh.pipe
        return sum(self.layers_per_stage[rank :: self.mesh.pipe])

    @property
    def num_layer_slots(self) -> int:
        """Layers that every rank allocates: every stage has as many as the largest one."""
        if self.layers_per_stage is None:
            return self.layers_of(0)
        return max(self.layers_per_stage) * len(self.layers_per_stage) // self.mesh.pipe


def minimum_bytes(sizes: StepSizes, *, merged_sums: int = 0) -> dict[str, float]:
    """Return the minimum bytes that the busiest device sends in a step, by mesh axes such as `tensor` or `pipe+data`.

    >>> minimum_bytes(StepSizes(model=config, mesh=MeshSpec(data=2, pipe=2), ...))["pipe"]
    262144

    Args:
        merged_sums: number of activations (0 to 2) whose all-reduces over `tensor` and then over `pipe`, for a split
            vocabulary, are merged into one over `pipe+tensor`, which sends less. XLA merges them on GPUs unless a
            conversion to bfloat16 lies between. If any is merged, those of the loss are too.

    Raises:
        PlanError: `merged_sums` is negative.
    """
    check_count("merged_sums", merged_sums, error=PlanError, least=0)
    found: dict[str, float] = {}
    for rank in range(sizes.mesh.pipe):
        of_rank: dict[str, float] = {}
        for part in (
            _gradients(sizes, rank),
            _layers(sizes, rank),
            _hops(sizes, rank),
            _vocabulary(sizes, rank, merged_sums),
        ):
            for axes, sent_bytes in part:
                of_rank[axes] = of_rank.get(axes, 0) + sent_bytes
        found = {axes: max(found.get(axes, 0), of_rank.get(axes, 0)) for axes in found | of_rank}
    return {axes: sent_bytes for axes, sent_bytes in found.items() if sent_bytes}


def _gradients(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-reduce of the rank's block gradients over data."""
    mesh = sizes.mesh
    num_params = sizes.layers_of(rank) * block_params(sizes.model, tensor=mesh.tensor)
    yield mesh.label("batch"), _FLOAT32 * num_params * _all_reduce(mesh.data)


def _layers(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-reduces of attention and feed-forward, forward and backward."""
    num_runs = 4 * sizes.layers_of(rank) * sizes.num_microbatches
    yield sizes.mesh.label("tensor"), num_runs * sizes.boundary * _all_reduce(sizes.mesh.tensor)


def _hops(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the sends: an activation to the next stage and a gradient to the previous one, if on another rank."""
    pipe, chunks = sizes.mesh.pipe, sizes.num_chunks
    if pipe == 1:
        return
    is_first, is_last = rank == 0, rank == pipe - 1
    num_hops = (chunks - is_last) + (chunks - is_first)
    yield sizes.mesh.label("pipe"), num_hops * sizes.num_microbatches * sizes.boundary


def _vocabulary(sizes: StepSizes, rank: int, merged_sums: int) -> Iterator[tuple[str, float]]:
    """Yield the traffic of embedding, final norm, head and loss: their gradients and the collectives of their split."""
    model, mesh, runs = sizes.model, sizes.mesh, sizes.num_microbatches
    table, whole = vocabulary_params(model, tensor=mesh.tensor)
    pipe, tensor = mesh.label("pipe"), mesh.label("tensor")
    is_copied = sizes.vocab == "ends" or mesh.pipe == 1
    num_first = sizes.boundary * runs  # x of the embedding, summed over the slices of the table
    num_last = num_first + 3 * sizes.tokens * _FLOAT32 * runs  # dy of the head; maximum, normaliser, target logit
    if is_copied:
        yield mesh.label("pipe", "batch"), _FLOAT32 * (whole + table) * _all_reduce(mesh.pipe * mesh.data)
        num_sent = num_first * (rank == 0) + num_last * (rank == mesh.pipe - 1)
        yield tensor, num_sent * _all_reduce(mesh.tensor)
        return
    # Run by all ranks together, norm and positions have the same gradient on each.
    yield mesh.label("batch"), _FLOAT32 * (whole + table / mesh.pipe) * _all_reduce(mesh.data)
    # Over pipe all in float32: x of the embedding and dy of the head summed, three numbers a token, y and dx broadcast.
    x_bytes, loss = sizes.tokens * model.hidden_size * _FLOAT32, 3 * sizes.tokens * _FLOAT32
    apart, loss_apart = 2 - merged_sums, 0 if merged_sums else loss
    yield f"{pipe}+{tensor}", runs * (merged_sums * x_bytes + loss - loss_apart) * _all_reduce(mesh.pipe * mesh.tensor)
    yield tensor, runs * (apart * sizes.boundary + loss_apart) * _all_reduce(mesh.tensor)
    yield pipe, runs * (apart * x_bytes + loss_apart) * _all_reduce(mesh.pipe)
    yield pipe, runs * 2 * x_bytes * (mesh.pipe > 1)


def _all_reduce(size: int) -> float:
    """Return the bytes that each of `size` devices sends per byte of an all-reduced array."""
    return 2 * (size - 1) / size
