"""Suggest changes of a layout: another one that is legal, fits, and is faster or needs less memory.

Every suggestion has been priced. `diagnoses.py` names the mistakes and takes its fixes from here.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..meshes import MeshSpec
from .costs.layout import Layout
from .legal_layouts import expert_splits, legal_meshes
from .plan import Plan
from .training_search import TrainQuestion, layout_memory, price_layout

_GB = 1e9
# A suggestion must save at least 1% of the step.
_WORTHWHILE = 0.99
_CHUNKS = (2, 4)
_V_SHAPED = ("zb-v", "v-half")
# Keys without effect if pipe=1.
_HIDDEN = ("pipeline.chunks", "pipeline.layers_per_stage")

Change = dict[str, int | str]
"""Config keys with their new values."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change of the config and its effect in words; without a change only words."""

    change: Change
    text: str


def suggest_faster(question: TrainQuestion, plan: Plan, layouts: Iterable[Layout], *, otherwise: str) -> Suggestion:
    """Return the change to the fastest of these layouts that fits, or `otherwise` if none is faster by 1%."""
    room = max(question.memory_limit, plan.memory.total)
    fitting = [layout for layout in layouts if layout_memory(question, layout).total <= room]
    best = min((price_layout(question, layout) for layout in fitting), key=lambda one: one.time_s, default=None)
    if best is None or best.time_s >= _WORTHWHILE * plan.time_s:
        return Suggestion(change={}, text=otherwise)
    change = layout_change(plan.layout, best.layout)
    return Suggestion(change=change, text=f"{_set(change)}: {best.time_s:.3g} s a step, not {plan.time_s:.3g}.")


def suggest_smaller(question: TrainQuestion, plan: Plan) -> Suggestion:
    """Return the change of one key that saves most memory, else the mesh of these devices that needs least."""
    layout = plan.layout
    changes = [replace(layout, remat="full")]
    if layout.data * layout.context > 1:
        changes += [replace(layout, zero=zero) for zero in (1, 2, 3) if zero > layout.zero]
    changes += _with_other_splits(question, layout)
    if layout.sequences > 1:
        changes.append(replace(layout, sequences=1, microbatches=layout.microbatches * layout.sequences))
    meshes = [one for mesh in _meshes(question, layout) for one in _on_mesh(question, layout, mesh)]
    # Last, for its copies take time.
    for others in (changes, meshes, [replace(layout, offload="optimizer")]):
        sizes: list[tuple[float, Layout]] = [(layout_memory(question, one).total, one) for one in others]
        size, best = min(sizes, key=lambda pair: pair[0], default=(math.inf, layout))
        if size < plan.memory.total:
            change = layout_change(layout, best)
            return Suggestion(change=change, text=f"{_set(change)}: {(plan.memory.total - size) / _GB:.1f} GB less.")
    return Suggestion(change={}, text="use more devices, or a smaller model.")


def narrower_tensor(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield layouts of the same devices with a smaller tensor axis whose groups lie within nodes."""
    node = question.topology.devices_per_node
    for mesh in _meshes(question, layout):
        if mesh.tensor < layout.tensor and node % mesh.tensor == 0:
            yield from _on_mesh(question, layout, mesh)


def closer_experts(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield this layout with experts split over as many ranks or fewer, in groups that lie within nodes."""
    node = question.topology.devices_per_node
    for other in _with_other_splits(question, layout):
        if other.expert <= layout.expert and node % (other.expert * other.expert_stride) == 0:
            yield other


def _with_other_splits(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield this layout with every split of the experts."""
    for split in expert_splits(question.model, data=layout.data, context=layout.context):
        yield replace(layout, **split)


def even_pipes(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield layouts with even stages: this one without its own `layers_per_stage`, and those of another pipe axis."""
    if layout.layers_per_stage is not None:
        yield replace(layout, layers_per_stage=None)
    for mesh in _meshes(question, layout):
        if mesh.pipe != layout.pipe and question.model.num_layers % mesh.pipe == 0:
            yield from _on_mesh(question, layout, mesh)


def fuller_pipes(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield layouts of the same mesh with more microbatches, chunks, or another schedule."""
    shard = layout.microbatches * layout.sequences
    for count in range(layout.microbatches, shard + 1):
        if shard % count:
            continue
        more = replace(layout, microbatches=count, sequences=shard // count)
        # A search takes about a second, and its result would be close to 1F1B with chunks and more microbatches.
        if layout.family.order == "fixed":
            yield more
        yield replace(more, schedule="1f1b", chunks=1, max_in_flight=None, layers_per_stage=_kept(layout, 1))
        for chunks in _CHUNKS:
            if layout.pipe * chunks <= question.model.num_layers and count % layout.pipe == 0:
                stages = _kept(layout, chunks)
                yield replace(
                    more, schedule="interleaved-1f1b", chunks=chunks, max_in_flight=None, layers_per_stage=stages
                )
        if layout.pipe > 1 and 2 * layout.pipe <= question.model.num_layers:
            for name in _V_SHAPED:
                yield replace(more, schedule=name, chunks=2, max_in_flight=None, layers_per_stage=_kept(layout, 2))


def layout_change(old: Layout, new: Layout) -> Change:
    """Return the config keys in which two layouts of one batch differ, with the new values."""
    # With pipe=1 the config may hold any value of these keys; with a pipeline they take effect, so they are set.
    hidden = _HIDDEN if old.pipe == 1 < new.pipe else ()
    return {key: value for key, value in _keys(new).items() if key in hidden or value != _keys(old)[key]}


def _keys(layout: Layout) -> Change:
    """Return the config keys that a layout sets, with their values."""
    stages = layout.layers_per_stage
    return {
        "mesh.data": layout.data // layout.data_expert,
        "mesh.expert": layout.data_expert,
        "mesh.tensor": layout.tensor,
        "mesh.pipe": layout.pipe,
        "mesh.context": layout.context // layout.context_expert,
        "mesh.context_expert": layout.context_expert,
        **({"pipeline.context_attention": layout.context_attention} if layout.context > 1 else {}),
        "pipeline.schedule": layout.schedule,
        "pipeline.chunks": layout.chunks,
        "pipeline.microbatches": layout.microbatches,
        "pipeline.remat": layout.remat,
        "pipeline.max_in_flight": layout.max_in_flight or 0,
        "pipeline.layers_per_stage": "auto" if stages is None else ",".join(map(str, stages)),
        "train.shard": layout.shard,
        "train.offload": layout.offload,
    }


def _set(change: Change) -> str:
    """Return a change in words."""
    words = [f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in change.items()]
    return f"set {', '.join(words)}"


def _kept(layout: Layout, chunks: int) -> tuple[int, ...] | None:
    """Return the layout's own stages, or None for even ones if the number of stages changes."""
    return layout.layers_per_stage if chunks == layout.chunks else None


def _meshes(question: TrainQuestion, layout: Layout) -> Iterator[MeshSpec]:
    """Yield the legal meshes of the layout's devices that the batch splits over."""
    for mesh in legal_meshes(question.model, num_devices=layout.num_devices, context=layout.context):
        if question.batch_size % mesh.data == 0:
            yield mesh


def _on_mesh(question: TrainQuestion, layout: Layout, mesh: MeshSpec) -> Iterator[Layout]:
    """Yield the layout on another mesh, with as many sequences per microbatch or one; by 1F1B if it must.

    Of a mixture of experts with every split of the experts.
    """
    shard = question.batch_size // mesh.data
    splits = expert_splits(question.model, data=mesh.data, context=layout.context)
    for sequences, split in itertools.product({math.gcd(layout.sequences, shard), 1}, splits):
        count = shard // sequences
        keeps = _can_keep(question, layout, mesh, count)
        yield Layout(
            data=mesh.data,
            tensor=mesh.tensor,
            pipe=mesh.pipe,
            **split,
            context=layout.context,
            context_attention=layout.context_attention if mesh.tensor == layout.tensor else "auto",
            schedule=layout.schedule if keeps else "1f1b",
            chunks=layout.chunks if keeps else 1,
            microbatches=count,
            sequences=sequences,
            remat=layout.remat,
            zero=layout.zero if mesh.data * layout.context > 1 else 0,
            gathers=layout.gathers,
            offload="none" if layout.offload == "residuals" and mesh.pipe == 1 else layout.offload,
            max_in_flight=layout.max_in_flight if keeps else None,
        )


def _can_keep(question: TrainQuestion, layout: Layout, mesh: MeshSpec, microbatches: int) -> bool:
    """Return whether a layout's schedule with its chunks runs on another mesh without a new search."""
    if layout.family.chunks in ("one", "any"):
        return layout.chunks == 1 and layout.family.order == "fixed"
    # A V needs no whole groups of microbatches.
    is_even = layout.family.chunks == "two" or microbatches % mesh.pipe == 0
    fits = mesh.pipe * layout.chunks <= question.model.num_layers and is_even
    return mesh.pipe > 1 and layout.chunks > 1 and fits
