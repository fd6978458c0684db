"""What a training step keeps on every rank of the pipeline, by purpose. Read `step_time.py` for its time.

Weights, gradients and optimizer follow from parameters, shards and the kind of program; activations from what a layer
keeps and how many microbatches the schedule has in flight. Temporary memory is what the head needs while it runs, and
the matrices in the form that the loops take them.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

from ...layers import ModelConfig
from ...layers.projected_loss import chunk_tokens
from ...pipeline.schedules import Clock, Vocab, simulate
from .activations import boundary_bytes, layer_activation_bytes
from .data_time import device_params
from .layouts import Layout
from .minimum import block_params
from .operations import item_bytes
from .pipeline_time import AutoTerms, auto_terms, is_auto_built_whole, plan_schedule
from .program import TRELLAX, Program
from .stage_time import stage_layers

_FLOAT32 = 4
_WORKSPACE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one device of one pipeline rank, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all classes together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def classes(self) -> dict[str, int]:
        """Bytes by class, as whole numbers."""
        return {field.name: round(getattr(self, field.name)) for field in fields(self)}


def step_memory(
    model: ModelConfig, *, layout: Layout, num_tokens: int, program: Program = TRELLAX
) -> tuple[MemoryUse, ...]:
    """Return what a training step keeps on a device of every pipeline rank; the fullest decides whether it fits."""
    layers = stage_layers(model, layout)
    in_flight = peak_in_flight(
        layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        num_chunks=layout.chunks,
        clock=program.clock,
        vocab=program.vocab,
        auto=auto_terms(model, layout=layout, num_tokens=num_tokens, vocab=program.vocab),
    )
    return tuple(
        _rank_memory(
            model,
            layout=layout,
            program=program,
            num_tokens=num_tokens,
            rank=rank,
            layers=layers[rank :: layout.pipe],
            held=in_flight[rank],
        )
        for rank in range(layout.pipe)
    )


def fullest(ranks: tuple[MemoryUse, ...]) -> MemoryUse:
    """Return the memory of the rank that needs most."""
    return max(ranks, key=lambda rank: rank.total)


@lru_cache(maxsize=4096)
def peak_in_flight(
    schedule: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int,
    clock: Clock,
    vocab: Vocab,
    auto: AutoTerms | None = None,
) -> tuple[int, ...]:
    """Return the microbatches of a chunk that each rank holds at its peak.

    More than a few microbatches a rank change nothing but for gpipe, which holds all, and auto, which may. In lockstep
    one program holds the largest number everywhere, and for schedules of a formula (see their files) no grid is built.
    """
    if num_ranks == 1:
        return (1,)
    everything = num_microbatches * num_chunks
    if schedule == "gpipe":
        return (everything,) * num_ranks
    if clock == "lockstep" and schedule in ("1f1b", "zb-h1", "interleaved-1f1b"):
        later = 1 if vocab == "split" else 0
        most = {
            "1f1b": 2 * (num_ranks - 1) + later,
            "zb-h1": num_ranks,
            "interleaved-1f1b": (num_chunks + 1) * num_ranks - 2 + later,
        }[schedule]
        return (min(everything, most),) * num_ranks
    few = min(num_microbatches, (2 * num_chunks + 1) * num_ranks if num_chunks > 1 else 2 * num_ranks)
    if is_auto_built_whole(schedule, num_stages=num_ranks * num_chunks, num_microbatches=num_microbatches):
        few = num_microbatches
    sizes = {"num_ranks": num_ranks, "num_microbatches": few, "num_chunks": num_chunks}
    peaks = simulate(plan_schedule(schedule, **sizes, clock=clock, vocab=vocab, auto=auto), clock=clock).peak_in_flight
    if schedule == "auto" and max(peaks) == few * num_chunks:
        return (everything,) * num_ranks
    return peaks if clock == "async" else (max(peaks),) * num_ranks


def _rank_memory(
    model: ModelConfig,
    *,
    layout: Layout,
    program: Program,
    num_tokens: int,
    rank: int,
    layers: tuple[int, ...],
    held: int,
) -> MemoryUse:
    stage = 0 if rank == 0 else -1 if rank == layout.pipe - 1 else 1
    params = device_params(model, layout=layout, program=program, num_layers=sum(layers), stage=stage)
    kept = layer_activation_bytes(model, layout=layout, program=program, num_tokens=num_tokens)
    num_layers = held * max(layers) if layout.pipe > 1 else sum(layers)
    state = _state_bytes(layout, program)
    return MemoryUse(
        weights=state["weights"] * params,
        gradients=state["gradients"] * params,
        optimizer=state["optimizer"] * params,
        activations=kept * num_layers
        + _end_bytes(model, layout=layout, program=program, num_tokens=num_tokens, rank=rank, held=held),
        temporary=_temporary_bytes(model, layout=layout, program=program, num_tokens=num_tokens, rank=rank)
        + (_copied_bytes(model, layout=layout, num_layers=sum(layers)) if program.clock == "lockstep" else 0.0),
    )


def _state_bytes(layout: Layout, program: Program) -> dict[str, float]:
    """Bytes a parameter: Megatron has 16-bit weights and float32 copies in the optimizer, trellax float32 weights."""
    is_eager = program.clock == "async"
    shards = layout.replicas * layout.context if layout.zero or layout.fsdp > 1 else 1
    whole = layout.replicas if layout.fsdp > 1 or layout.zero == 3 else 1
    weights, moments = (2.0, 12.0) if is_eager else (4.0, 8.0)
    gradients = float(program.gradient_bytes + program.fresh_gradient_bytes)
    return {"weights": weights / whole, "gradients": gradients / whole, "optimizer": moments / shards}


def _end_bytes(model: ModelConfig, *, layout: Layout, program: Program, num_tokens: int, rank: int, held: int) -> float:
    """What is kept beside layers: in lockstep what arrives and leaves, else what embedding and head keep.

    trellax holds an arriving activation, an arriving gradient and one on its way; gpipe all of the last stage's.
    Megatron holds masks of the embedding's dropout, the final norm's input and the head's.
    """
    boundary = boundary_bytes(model, layout=layout, program=program, num_tokens=num_tokens)
    if program.clock == "lockstep":
        waiting = layout.microbatches + 2 if layout.schedule == "gpipe" else 3
        return boundary * (waiting if layout.pipe > 1 else 1)
    masks = boundary / item_bytes(model) * held if rank == 0 and program.dropout == "on" else 0.0
    return masks + (2 * boundary if rank == layout.pipe - 1 else 0.0)


def _temporary_bytes(model: ModelConfig, *, layout: Layout, program: Program, num_tokens: int, rank: int) -> float:
    """Logits of one microbatch and their gradient where the head runs, and what one layer's backward works with."""
    is_split = program.vocab == "split" and layout.pipe > 1
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    parts = layout.tensor * (layout.pipe if is_split else 1)
    has_head = is_split or rank == layout.pipe - 1
    # trellax holds the logits of a chunk alone.
    held = min(tokens, chunk_tokens(model.hidden_size)) if program.clock == "lockstep" else tokens
    logits = held * model.vocab_size / parts * (_FLOAT32 + item) if has_head else 0.0
    once = 0.0
    if layout.remat != "none":
        kept = replace(layout, remat="none")
        once = layer_activation_bytes(model, layout=kept, program=program, num_tokens=num_tokens)
    if program.clock == "lockstep":
        return max(logits, once)
    return max(logits + _backward_bytes(model, layout=layout, tokens=tokens), once) + _WORKSPACE_BYTES


def _copied_bytes(model: ModelConfig, *, layout: Layout, num_layers: int) -> float:
    """Matrices as the loops over layers take them, made once a step: cast, or joined where columns are split."""
    if item_bytes(model) < _FLOAT32:
        return num_layers * item_bytes(model) * block_params(model, tensor=layout.tensor)
    if layout.tensor == 1:
        return 0.0
    columns = model.query_size / layout.tensor + 2 * max(model.kv_size / layout.tensor, model.head_size)
    columns += 2 * model.ffn_size / layout.tensor if model.mlp == "swiglu" else 0.0
    return num_layers * _FLOAT32 * model.hidden_size * columns


def _backward_bytes(model: ModelConfig, *, layout: Layout, tokens: float) -> float:
    """The feed-forward's gradients, and its largest weight gradient in float32 before it is added.

    Both are alive together with the logits in the first backward of a microbatch: 14 peaks on B200 tell
    (simumax_b200_a100.toml).
    """
    num_up = 2 if model.mlp == "swiglu" else 1
    features = model.ffn_size / layout.tensor
    gradients = tokens * item_bytes(model) * (num_up + 1) * features
    return gradients + _FLOAT32 * num_up * features * model.hidden_size
