"""What to change in a layout instead: a layout that is legal, fits, and is faster or smaller, found by pricing it.

`diagnoses.py` says what is wrong and takes its advice from here, so that no advice repeats what is set already.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..meshes import MeshSpec
from .costs.layouts import Layout, legal_meshes
from .plans import Plan
from .search import TrainQuestion, layout_memory, price_layout

_GB = 1e9
_WORTHWHILE = 0.99
_CHUNKS = (2, 4)
_HIDDEN = ("pipeline.chunks", "pipeline.layers_per_stage")

Change = dict[str, int | str]
"""Keys of a config with their new values."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What to set, and what it does in words; without a change it is words alone."""

    change: Change
    text: str


def make_faster(question: TrainQuestion, plan: Plan, layouts: Iterable[Layout], *, otherwise: str) -> Remedy:
    """Return the change to the fastest of these layouts that fits, or the words if none is faster by a hundredth."""
    room = max(question.memory_limit, plan.memory.total)
    fitting = [layout for layout in layouts if layout_memory(question, layout).total <= room]
    best = min((price_layout(question, layout) for layout in fitting), key=lambda one: one.time_s, default=None)
    if best is None or best.time_s >= _WORTHWHILE * plan.time_s:
        return Remedy(change={}, text=otherwise)
    change = layout_change(plan.layout, best.layout)
    return Remedy(change=change, text=f"{_set(change)}: {best.time_s:.3g} s a step, not {plan.time_s:.3g}.")


def make_smaller(question: TrainQuestion, plan: Plan) -> Remedy:
    """Return the change of one key that saves most memory, or another mesh of these devices that needs less."""
    layout = plan.layout
    changes = [replace(layout, remat="full")]
    if layout.data > 1 and layout.zero == 0:
        changes.append(replace(layout, zero=1))
    if layout.sequences > 1:
        changes.append(replace(layout, sequences=1, microbatches=layout.microbatches * layout.sequences))
    for others in (changes, [one for mesh in _meshes(question, layout) for one in _on_mesh(question, layout, mesh)]):
        sizes: list[tuple[float, Layout]] = [(layout_memory(question, one).total, one) for one in others]
        size, best = min(sizes, key=lambda pair: pair[0], default=(math.inf, layout))
        if size < plan.memory.total:
            change = layout_change(layout, best)
            return Remedy(change=change, text=f"{_set(change)}: {(plan.memory.total - size) / _GB:.1f} GB less.")
    return Remedy(change={}, text="use more devices, or a smaller model.")


def narrower_tensor(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield layouts of the same devices with a smaller tensor axis that lies within nodes."""
    node = question.topology.devices_per_node
    for mesh in _meshes(question, layout):
        if mesh.tensor < layout.tensor and node % mesh.tensor == 0:
            yield from _on_mesh(question, layout, mesh)


def even_pipes(question: TrainQuestion, layout: Layout) -> Iterator[Layout]:
    """Yield layouts whose stages are even: the same without sizes of its own, or with another pipe axis."""
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
        # "auto" takes a second to build; 1F1B with chunks and more microbatches is what it would be near to.
        if layout.schedule != "auto":
            yield more
        yield replace(more, schedule="1f1b", chunks=1, max_in_flight=None, layers_per_stage=_kept(layout, 1))
        for chunks in _CHUNKS:
            if layout.pipe * chunks <= question.model.num_layers and count % layout.pipe == 0:
                stages = _kept(layout, chunks)
                yield replace(
                    more, schedule="interleaved-1f1b", chunks=chunks, max_in_flight=None, layers_per_stage=stages
                )


def layout_change(old: Layout, new: Layout) -> Change:
    """Return the config's keys in which two layouts of one batch differ, with the new values."""
    # A layout without a pipe does not say what its config has for these, which then begins to count.
    hidden = _HIDDEN if old.pipe == 1 < new.pipe else ()
    return {key: value for key, value in _keys(new).items() if key in hidden or value != _keys(old)[key]}


def _keys(layout: Layout) -> Change:
    stages = layout.layers_per_stage
    return {
        "mesh.data": layout.data,
        "mesh.tensor": layout.tensor,
        "mesh.pipe": layout.pipe,
        "pipeline.schedule": layout.schedule,
        "pipeline.chunks": layout.chunks,
        "pipeline.microbatches": layout.microbatches,
        "pipeline.remat": layout.remat,
        "pipeline.max_in_flight": layout.max_in_flight or 0,
        "pipeline.layers_per_stage": "auto" if stages is None else ",".join(map(str, stages)),
        "optimizer.zero": "on" if layout.zero else "off",
    }


def _set(change: Change) -> str:
    words = [f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in change.items()]
    return f"set {', '.join(words)}"


def _kept(layout: Layout, chunks: int) -> tuple[int, ...] | None:
    return layout.layers_per_stage if chunks == layout.chunks else None


def _meshes(question: TrainQuestion, layout: Layout) -> Iterator[MeshSpec]:
    for mesh in legal_meshes(question.model, num_devices=layout.num_devices, vocab=question.program.vocab):
        if question.batch_size % mesh.data == 0:
            yield mesh


def _on_mesh(question: TrainQuestion, layout: Layout, mesh: MeshSpec) -> Iterator[Layout]:
    """The layout on another mesh: with as many sequences a microbatch as before and fewer, by 1F1B where it must."""
    shard = question.batch_size // mesh.data
    for sequences in {math.gcd(layout.sequences, shard), 1}:
        count = shard // sequences
        keeps = _can_keep(question, layout, mesh, count)
        yield Layout(
            data=mesh.data,
            tensor=mesh.tensor,
            pipe=mesh.pipe,
            schedule=layout.schedule if keeps else "1f1b",
            chunks=layout.chunks if keeps else 1,
            microbatches=count,
            sequences=sequences,
            remat=layout.remat,
            zero=layout.zero if mesh.data > 1 else 0,
            max_in_flight=layout.max_in_flight if keeps else None,
        )


def _can_keep(question: TrainQuestion, layout: Layout, mesh: MeshSpec, microbatches: int) -> bool:
    """Whether a schedule with its chunks runs on another mesh."""
    if not layout.schedule.startswith("interleaved"):
        return layout.chunks == 1 and layout.schedule != "auto"
    fits = mesh.pipe * layout.chunks <= question.model.num_layers and microbatches % mesh.pipe == 0
    return mesh.pipe > 1 and layout.chunks > 1 and fits
