"""The least that a training step of our transformer must send, by arithmetic: what its traffic is held against.

In the conventions of `../../programs/collectives.py`: bytes that the busiest device sends in a step, by mesh axes.
Gradients are summed over data once, in float32 (2 (d - 1) / d each, as one all-reduce or as ZeRO's reduce-scatter and
all-gather).
Tensor parallelism all-reduces an activation twice a layer forward and twice backward (Shoeybi et al. 2019, section 3).
A pipeline boundary takes an activation forward and its gradient back. The vocabulary's part stands apart below.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ...layers import ModelConfig, param_counts
from ...meshes import AXES, MeshSpec, PlanError
from ...meshes.arguments import check_count, check_fields
from ...pipeline.schedules import Vocab

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """The sizes of a training step that decide what must be sent; sequences are those of one microbatch and data shard.

    >>> StepSizes(model=config, mesh=MeshSpec(data=2), num_microbatches=4, num_sequences=1, num_tokens=128).boundary
    65536

    Raises:
        PlanError: a size is below 1, or `vocab` is no choice.
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
        """Layers that every rank has room for: as many a stage as the largest has."""
        if self.layers_per_stage is None:
            return self.layers_of(0)
        return max(self.layers_per_stage) * len(self.layers_per_stage) // self.mesh.pipe


def minimum_bytes(sizes: StepSizes, *, merged_sums: int = 0) -> dict[str, float]:
    """Return by mesh axes (`data`, `tensor`, `pipe`, `pipe+data`) the least bytes that the busiest device sends a step.

    >>> minimum_bytes(StepSizes(model=config, mesh=MeshSpec(data=2, pipe=2), ...))["pipe"]
    262144

    Args:
        merged_sums: how many of a split vocabulary's two sums of an activation, over tensor and then over pipe, are one
            sum over `pipe+tensor`: XLA makes that of them on GPUs, but not where a bfloat16 lies between. If any is,
            those of the loss are too. Together they send less than one after the other.
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
    """The stage's own gradients over data."""
    num_params = sizes.layers_of(rank) * block_params(sizes.model, tensor=sizes.mesh.tensor)
    yield "data", _FLOAT32 * num_params * _all_reduce(sizes.mesh.data)


def _layers(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Attention and feed-forward, forward and backward."""
    num_runs = 4 * sizes.layers_of(rank) * sizes.num_microbatches
    yield "tensor", num_runs * sizes.boundary * _all_reduce(sizes.mesh.tensor)


def _hops(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """One activation to the next stage, one gradient to the stage before, where there is one on another rank."""
    pipe, chunks = sizes.mesh.pipe, sizes.num_chunks
    if pipe == 1:
        return
    is_first, is_last = rank == 0, rank == pipe - 1
    num_hops = (chunks - is_last) + (chunks - is_first)
    yield "pipe", num_hops * sizes.num_microbatches * sizes.boundary


def _vocabulary(sizes: StepSizes, rank: int, merged_sums: int) -> Iterator[tuple[str, float]]:
    """Embedding, final norm, head and loss: their gradients, and what their split over tensor and pipe costs."""
    model, mesh, runs = sizes.model, sizes.mesh, sizes.num_microbatches
    table, whole = vocabulary_params(model, tensor=mesh.tensor)
    is_copied = sizes.vocab == "ends" or mesh.pipe == 1
    num_first = sizes.boundary * runs  # x of the embedding, summed over the slices of the table
    num_last = num_first + 3 * sizes.tokens * _FLOAT32 * runs  # dy of the head; maximum, normaliser, target logit
    if is_copied:
        yield _over_copies(mesh), _FLOAT32 * (whole + table) * _all_reduce(mesh.pipe * mesh.data)
        num_sent = num_first * (rank == 0) + num_last * (rank == mesh.pipe - 1)
        yield "tensor", num_sent * _all_reduce(mesh.tensor)
        return
    # Run by all ranks together, norm and positions have the same gradient on each.
    yield "data", _FLOAT32 * (whole + table / mesh.pipe) * _all_reduce(mesh.data)
    # Over pipe all in float32: x of the embedding and dy of the head summed, three numbers a token, y and dx broadcast.
    x_bytes, loss = sizes.tokens * model.hidden_size * _FLOAT32, 3 * sizes.tokens * _FLOAT32
    apart, loss_apart = 2 - merged_sums, 0 if merged_sums else loss
    yield "pipe+tensor", runs * (merged_sums * x_bytes + loss - loss_apart) * _all_reduce(mesh.pipe * mesh.tensor)
    yield "tensor", runs * (apart * sizes.boundary + loss_apart) * _all_reduce(mesh.tensor)
    yield "pipe", runs * (apart * x_bytes + loss_apart) * _all_reduce(mesh.pipe)
    yield "pipe", runs * 2 * x_bytes * (mesh.pipe > 1)


def block_params(model: ModelConfig, *, tensor: int) -> int:
    """Return the number of parameters of one block on one device.

    Heads and features are split; norms, output biases, and key and value heads fewer than `tensor` are whole.
    """
    d, q, kv, f = model.hidden_size, model.query_size, model.kv_size, model.ffn_size
    num_up = 2 if model.mlp == "swiglu" else 1
    split_kv = tensor if model.num_kv_heads % tensor == 0 else 1
    heads = q // tensor + 2 * kv // split_kv
    columns = heads + num_up * f // tensor
    weights = d * columns + (q + f) // tensor * d
    norms = 2 * d * (2 if model.norm == "layernorm" and model.bias == "on" else 1)
    head_norms = 2 * model.head_size if model.qk_norm == "on" else 0
    biases = {"off": 0, "qkv": heads, "on": columns + 2 * d}[model.bias]
    return weights + norms + head_norms + biases


def vocabulary_params(model: ModelConfig, *, tensor: int) -> tuple[int, int]:
    """Return the parameters of embedding and head on one device: those split over the vocabulary, and those whole."""
    counts = param_counts(model)
    tables = counts.embedding * (1 if model.embeddings == "tied" else 2)
    norm = counts.head - (counts.embedding if model.embeddings == "untied" else 0)
    return tables // tensor, counts.positions + norm


def _all_reduce(size: int) -> float:
    return 2 * (size - 1) / size


def _over_copies(mesh: MeshSpec) -> str:
    """The axes over which a replicated parameter has copies with gradients of their own."""
    return "+".join(axis for axis in AXES if axis != "tensor" and mesh.sizes[axis] > 1) or "data"
