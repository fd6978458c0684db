"""Compute the minimum traffic of a training step, with which the traffic of compiled programs is compared.

Traffic is counted as in `../../programs/collectives.py`: bytes that the busiest device sends in a step, by mesh axes.
- Gradients are summed over `data` once, in float32, each device a part of them; and weights are sent once to all, in
  the dtype that they are multiplied in: (d - 1) / d of 4 and of 2 bytes in bfloat16. Norms and biases are sent in
  float32.
- Tensor parallelism all-reduces an activation twice per layer forward and twice backward (Shoeybi et al. 2019,
  section 3). An all-reduce over t devices sends 2 (t - 1) / t of the array.
  With sequence parallelism a reduce-scatter and an all-gather of half of that each take its place (Korthikanti et al.
  2022, section 4.2.2), and what a stage sends to the next is a t-th of the activation.
- Keys and values are gathered over `context` in every layer, and their gradients reduce-scattered, each
  2 b s h_kv (c - 1) / c numbers, for s tokens of a sequence (Llama Team 2024, section 3.3.2); or tokens are exchanged
  for heads, 2 b s (h + h_kv) (c - 1) / c^2 each way (Jacobs et al. 2023). Each device has s / c tokens, and gradients
  are summed over data x context.
- Every boundary between stages on two ranks sends an activation forward and its gradient back.
- A layer of experts sends each token to its experts and back, forward and backward.
- Embedding, head and loss are counted apart, in `_vocabulary`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...layers import ModelConfig, Remat
from ...layers.attention.counts import attention_widths
from ...layers.context.choice import Way
from ...layers.experts.kinds import layer_kinds, layers_by_kind
from ...layers.lora.linears import adapted_of
from ...meshes import MeshSpec, PlanError
from ...meshes.arguments import check_fields
from ...meshes.axes import CONTEXT_ROLES, EXPERT_ROLES, KEPT_ROLES, SUMMED_ROLES, Role
from ...meshes.spec import Shard
from ...schedules import Placement, Vocab
from .device_params import block_matrices, block_params, ends_of, expert_matrices, vocabulary_params
from .held_layers import KindCounts, kinds_of_stages

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of a training step that determine its traffic; sequences are those of one microbatch on one data shard.

    Without a `placement` stages are placed in a loop.

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
    placement: Placement | None = None
    context_attention: Way = "gather"

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)

    @property
    def placed(self) -> Placement:
        """The rank of every stage: the placement given, or a loop."""
        return self.placement or Placement.of("loop", num_ranks=self.mesh.pipe, num_chunks=self.num_chunks)

    @property
    def boundary(self) -> int:
        """Bytes of one microbatch's activation between two layers, in the compute dtype: x[b, T, D]."""
        return self.tokens * self.model.hidden_size * _ITEM_BYTES[self.model.dtype]

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether activations between layers are split by tokens over tensor."""
        return self.mesh.splits_tokens(self.num_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch on one device of a data shard, of all its tensor ranks."""
        return self.num_sequences * self.mesh.tokens_of_rank(self.num_tokens)

    @property
    def shards(self) -> int:
        """Devices over which gradients are summed: data x context."""
        return self.mesh.data * self.mesh.context

    def layers_of(self, rank: int) -> int:
        """Layers of one pipeline rank, over all its chunks."""
        return sum(self.layers_of_stages[stage] for stage in self.placed.stages_of(rank))

    @property
    def layers_of_stages(self) -> tuple[int, ...]:
        """Layers of every stage: those given, or equal ones."""
        num_stages = self.mesh.pipe * self.num_chunks
        return self.layers_per_stage or (self.model.num_layers // num_stages,) * num_stages

    def kinds_of(self, rank: int) -> KindCounts:
        """Layers of each kind of one pipeline rank, over all its chunks."""
        kinds, own = kinds_of_stages(self.model, self.layers_of_stages), self.placed.stages_of(rank)
        total: dict[ModelConfig, int] = {}
        for kind, count in (pair for stage in own for pair in kinds[stage]):
            total[kind] = total.get(kind, 0) + count
        return tuple(total.items())

    @property
    def layer_slots(self) -> KindCounts:
        """Layers of each kind that every rank allocates: every stage has as many as any has."""
        stages = self.layers_of_stages
        counts, chunks = layers_by_kind(self.model, stages), len(stages) // self.mesh.pipe
        return tuple((kind.config, chunks * max(counts[kind.name])) for kind in layer_kinds(self.model))


def minimum_bytes(sizes: StepSizes) -> dict[str, float]:
    """Return the minimum bytes that the busiest device sends in a step, by mesh axes such as `tensor` or `pipe+data`.

    >>> minimum_bytes(StepSizes(model=config, mesh=MeshSpec(data=2, pipe=2), ...))["pipe"]
    262144
    """
    found: dict[str, float] = {}
    for rank in range(sizes.mesh.pipe):
        of_rank: dict[str, float] = {}
        for part in (
            _gradients(sizes, rank),
            _layers(sizes, rank),
            _experts(sizes, rank),
            _context(sizes, rank),
            _hops(sizes, rank),
            _vocabulary(sizes, rank),
        ):
            for axes, sent_bytes in part:
                of_rank[axes] = of_rank.get(axes, 0) + sent_bytes
        # The busiest rank may be a different one for each axis.
        found = {axes: max(found.get(axes, 0), of_rank.get(axes, 0)) for axes in found | of_rank}
    return {axes: sent_bytes for axes, sent_bytes in found.items() if sent_bytes}


def explain_ratios(sizes: StepSizes, *, shard: Shard = "none", remat: Remat = "dots") -> tuple[str, ...]:
    """Return why a compiled step sends more than the minimum over some axes, a sentence for each reason."""
    found, mesh = [], sizes.mesh
    if sizes.is_sequence_parallel:
        again = "the backward gathers the inputs of attention and feed-forward again, to keep a part of them"
        found.append(f"{mesh.label('tensor')}: with sequence parallelism {again}; in a block 1.25 times the minimum.")
    if mesh.expert > 1 and sizes.model.expert_capacity > 1:
        rows = (
            f"expert_capacity={sizes.model.expert_capacity} sends that many rows for each pair of a token and an expert"
        )
        found.append(f"{mesh.label(*EXPERT_ROLES)}: {rows}, some of them empty.")
    if mesh.tensor > 1 and remat == "full":
        found.append(f"{mesh.label('tensor')}: with remat='full' the backward repeats what the forward has sent.")
    if mesh.context > 1 and sizes.context_attention == "gather":
        again = "the backward gathers keys and values again, to keep those of its own tokens alone"
        found.append(f"{mesh.label(*CONTEXT_ROLES)}: {again}; 1.5 times the minimum.")
    elif mesh.context > 1 and sizes.context_attention == "gather-once" and remat == "full":
        again = "with remat='full' the forward that the backward repeats gathers keys and values again"
        found.append(f"{mesh.label(*CONTEXT_ROLES)}: {again}; 1.5 times the minimum.")
    elif mesh.context > 1 and sizes.context_attention == "ulysses" and remat != "none":
        again = f"with remat={remat!r} the backward repeats the exchanges of the forward"
        found.append(f"{mesh.label(*CONTEXT_ROLES)}: {again}; 1.5 times the minimum.")
    over = mesh.label(*SUMMED_ROLES)
    if sizes.shards > 1 and shard in ("chunk", "layer"):
        when = "every microbatch" if shard == "layer" else "each run of microbatches of a chunk"
        found.append(f"{over}: shard={shard!r} gathers weights in {when}, and sums gradients in every microbatch.")
    elif sizes.shards > 1 and shard != "step" and sizes.model.dtype != "float32":
        found.append(f"{over}: what is sent back is float32; shard='step' sends {sizes.model.dtype}.")
    return tuple(found)


def _adapter_gradients(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-reduces of the gradients of the rank's adapters, those of experts over data x context alone.

    At least: one of the two matrices of each is whole over tensor, and sent by all of its ranks.
    """
    mesh = sizes.mesh
    for kind, num_layers in sizes.kinds_of(rank):
        given: dict[str, Any] = {"rank": kind.lora_rank, "magnitude": kind.lora_magnitude}
        own = dict.fromkeys((False, True), 0.0)
        for one in adapted_of(kind):
            own[one.copies > 1] += one.adapter_params(**given) / mesh.tensor
        copies = sizes.shards // mesh.expert
        if own[True]:
            sent = _updated(sizes, 0, own[True] / mesh.expert, over=copies)
            yield mesh.label(*KEPT_ROLES), num_layers * sent
        yield mesh.label(*SUMMED_ROLES), num_layers * _updated(sizes, 0, own[False], over=sizes.shards)


def _gradients(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-reduces of the rank's gradients: those of blocks over data, of whole parameters over tensor."""
    mesh, split = sizes.mesh, {"tensor": sizes.mesh.tensor, "expert": sizes.mesh.expert}
    if sizes.model.lora_rank:
        yield from _adapter_gradients(sizes, rank)
        return
    for kind, num_layers in sizes.kinds_of(rank):
        # Experts are summed over the devices that have copies of them, all else over data x context.
        experts = expert_matrices(kind, **split)
        own, matrices = (count(kind, **split) - experts for count in (block_params, block_matrices))
        copies = sizes.shards // mesh.expert
        yield mesh.label(*KEPT_ROLES), num_layers * _updated(sizes, experts, 0, over=copies)
        whole = 0
        if sizes.is_sequence_parallel:
            # Of own = split / t + whole and the parameters of one device, split + whole: norms and biases, say.
            everything = block_params(kind, tensor=1) - expert_matrices(kind, tensor=1)
            whole = (mesh.tensor * own - everything) // (mesh.tensor - 1)
            yield _sum_whole(sizes, num_layers * whole, *SUMMED_ROLES)
        yield (
            mesh.label(*SUMMED_ROLES),
            num_layers * _updated(sizes, matrices, own - matrices - whole, over=sizes.shards),
        )


def _experts(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-to-all of a layer of experts: every pair of a token and an expert there and back, twice."""
    model, parts = sizes.model, sizes.mesh.expert
    num_layers = sum(count for kind, count in sizes.kinds_of(rank) if kind.num_experts)
    num_runs = 4 * num_layers * sizes.num_microbatches
    pairs = sizes.boundary * model.experts_per_token
    yield sizes.mesh.label(*EXPERT_ROLES) if parts > 1 else "expert", num_runs * pairs * (parts - 1) / parts


def _layers(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the all-reduces of attention and feed-forward, forward and backward: that of latents is of these alone."""
    share = attention_widths(sizes.model).entered / sizes.model.hidden_size
    num_runs = (3 + share) * sizes.layers_of(rank) * sizes.num_microbatches
    yield sizes.mesh.label("tensor"), num_runs * sizes.boundary * _all_reduce(sizes.mesh.tensor)


def _context(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield what attention sends of keys and values, or of heads, and of their gradients."""
    mesh, model = sizes.mesh, sizes.model
    if mesh.context == 1:
        return
    # With fewer key/value heads than tensor ranks each rank has one.
    own = attention_widths(model, tensor=mesh.tensor)
    width = own.key + own.value
    # A device has s / c tokens: a gather sends them to c - 1 others, an exchange a c-th part to each.
    if sizes.context_attention == "ulysses":
        width = (own.query + own.mixed + width) / mesh.context
    once = sizes.tokens * (mesh.context - 1) * width * _ITEM_BYTES[model.dtype]
    yield mesh.label(*CONTEXT_ROLES), 2 * sizes.layers_of(rank) * sizes.num_microbatches * once


def _hops(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the sends: an activation to the next stage and a gradient to the previous one, if on another rank."""
    ranks = sizes.placed.ranks
    others = [stage + step for stage in sizes.placed.stages_of(rank) for step in (1, -1)]
    num_hops = sum(0 <= other < len(ranks) and ranks[other] != rank for other in others)
    parts = sizes.mesh.tensor if sizes.is_sequence_parallel else 1
    yield sizes.mesh.label("pipe"), num_hops * sizes.num_microbatches * sizes.boundary / parts


def _vocabulary(sizes: StepSizes, rank: int) -> Iterator[tuple[str, float]]:
    """Yield the traffic of embedding, final norm, head and loss: their gradients and the collectives of their split."""
    model, mesh, runs = sizes.model, sizes.mesh, sizes.num_microbatches
    # Frozen tables have no gradients.
    is_copied = sizes.vocab == "ends" or mesh.pipe == 1
    parts = mesh.tensor * (1 if is_copied else mesh.pipe)
    table, whole = (0, 0) if model.lora_rank else vocabulary_params(model, parts=parts)
    pipe, tensor = mesh.label("pipe"), mesh.label("tensor")
    loss = 3 * sizes.tokens * _FLOAT32 * runs  # maximum, normaliser, target logit
    if is_copied:
        yield mesh.label("pipe", *SUMMED_ROLES), _updated(sizes, table, 0, over=mesh.pipe * sizes.shards)
        yield _sum_whole(sizes, whole, "pipe", *SUMMED_ROLES)
        # x of the embedding and dy of the head, each summed over the slices of the table.
        ends = ends_of(sizes.placed, rank)
        num_sent = sizes.boundary * runs * len(ends) + loss * ("head" in ends)
        yield tensor, num_sent * _all_reduce(mesh.tensor)
        return
    # Run by all ranks together, norm and positions have the same gradient on each.
    yield mesh.label(*SUMMED_ROLES), _updated(sizes, table, 0, over=sizes.shards)
    yield _sum_whole(sizes, whole, *SUMMED_ROLES)
    # x of the embedding and dy of the head are summed onto one rank, y and dx sent from one rank to all. Each device
    # of a tensor group needs to send its slice alone over pipe; before and after, the group exchanges slices.
    # A frozen embedding needs no dx.
    yield pipe, (3 if model.lora_rank else 4) * runs * sizes.boundary / mesh.tensor
    gather = 0.0 if sizes.is_sequence_parallel else (mesh.tensor - 1) / mesh.tensor
    yield tensor, runs * sizes.boundary * (2 * _all_reduce(mesh.tensor) + 2 * gather)
    yield f"{pipe}+{tensor}" if mesh.tensor > 1 else pipe, loss * _all_reduce(mesh.pipe * mesh.tensor)


def _sum_whole(sizes: StepSizes, params: int, *roles: Role) -> tuple[str, float]:
    """Return the all-reduce of gradients of norms, say: of each device's own tokens where those are split."""
    roles = (*roles, "tensor") if sizes.is_sequence_parallel else roles
    num_devices = math.prod(sizes.mesh.sizes[name] for name in sizes.mesh.roles.having(*roles))
    return sizes.mesh.label(*roles), _FLOAT32 * params * _all_reduce(num_devices)


def _updated(sizes: StepSizes, matrices: float, others: float, *, over: int) -> float:
    """Return the bytes to sum gradients over devices and to send the new weights to all of them."""
    item = _ITEM_BYTES[sizes.model.dtype]
    return ((_FLOAT32 + item) * matrices + 2 * _FLOAT32 * others) * (over - 1) / over


def _all_reduce(size: int) -> float:
    """Return the bytes that each of `size` devices sends per byte of an all-reduced array."""
    return 2 * (size - 1) / size
