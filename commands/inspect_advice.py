"""List the changes of a config that reduce the memory of its training step, with an estimate of the savings.

The estimates scale the memory classes of a compiled step (`Memory`) by what a change does to them:
- parameters, gradients and optimizer state by their new shardings;
- activations by the residuals of a layer in bytes, times the microbatches in flight under the new schedule;
- temporary memory in three parts: matrices cast to bfloat16 scale with the parameters, the working memory of a layer
  and of the head is estimated as twice their arrays, and the rest scales with activations.

To verify an estimate, inspect the changed config.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..configs.check import check_run
from ..configs.run_config import RunConfig
from ..layers import ModelConfig, Remat, activation_bytes
from ..layers.context.choice import kept_ranks
from ..layers.projected_loss import chunk_tokens
from ..meshes import MeshSpec, TrellaxError
from ..meshes.spec import SHARDS
from ..pipeline import lower, resolve_layers
from ..plan import StepSizes
from ..plan.costs.device_params import block_params, vocabulary_params, words_of_part
from ..programs import Memory
from ..schedules import build_schedule

_WORKING_COPIES = 2
"""Working memory / size of the arrays worked on, measured on H100 and H200 targets.

It is 1.4 to 1.7 for Llama 3 shapes of 8B, 70B and 405B, and 2.4 where attention keeps all its scores.
"""

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class MemorySaving:
    """A change of a config: its overrides, the estimated bytes saved on each device, and the devices it needs."""

    overrides: str
    saved_bytes: int
    devices: int


def list_memory_savings(
    config: RunConfig, *, mesh: MeshSpec, sizes: StepSizes, memory: Memory
) -> tuple[MemorySaving, ...]:
    """Return the valid changes of a config that save memory, the largest saving first.

    A larger tensor or pipe takes its devices from data, or doubles the devices where data is odd.

    Args:
        sizes: sizes of the compiled step.
        memory: memory of the compiled step on one device.
    """
    before = _Estimate(config, mesh, sizes)
    savings = []
    for overrides, changed, other in _changes(config, mesh):
        try:
            check_run(changed, num_devices=other.num_devices)
            after = _Estimate(changed, other, _resize(changed, other, sizes))
            total = after.total(memory, before)
        except TrellaxError:
            continue
        if total < memory.total:
            savings.append(
                MemorySaving(overrides=overrides, saved_bytes=memory.total - total, devices=other.num_devices)
            )
    return tuple(sorted(savings, key=lambda saving: (-saving.saved_bytes, saving.devices)))


def _changes(config: RunConfig, mesh: MeshSpec) -> Iterator[tuple[str, RunConfig, MeshSpec]]:
    """Yield the overrides, config and mesh of each change."""
    pipeline = config.pipeline
    more = pipeline.microbatches * 2
    yield f"--pipeline.microbatches {more}", _with(config, pipeline={"microbatches": more}), mesh
    for remat in ("dots", "full"):
        if (pipeline.remat, remat) not in (("full", "dots"), (remat, remat)):
            yield f"--pipeline.remat {remat}", _with(config, pipeline={"remat": remat}), mesh
    for shard in SHARDS[SHARDS.index(config.train.shard) + 1 :] if mesh.data * mesh.context > 1 else ():
        # Whole chunks save less than "layer", in ways that this estimate does not know.
        if shard != "chunk":
            yield f"--train.shard {shard}", _with(config, train={"shard": shard}), mesh
    if config.train.offload == "none":
        for offload in ("optimizer", *(("residuals",) if mesh.pipe > 1 else ())):
            yield f"--train.offload {offload}", _with(config, train={"offload": offload}), mesh
    for axis in (mesh.roles.tensor[-1], mesh.roles.pipe):
        changed = {axis: 2 * mesh.sizes[axis]}
        # Devices come from the outermost batch axis that can be halved, or are more.
        halved = [name for name in mesh.roles.batch if mesh.sizes[name] % 2 == 0][:1]
        changed |= {name: mesh.sizes[name] // 2 for name in halved}
        other = mesh.resize(**changed)
        words = " ".join(f"--mesh.{name} {size}" for name, size in changed.items())
        yield words, config.model_copy(update={"mesh": other}), other


def _with(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _resize(config: RunConfig, mesh: MeshSpec, sizes: StepSizes) -> StepSizes:
    num_microbatches = config.pipeline.microbatches
    num_sequences = config.train.batch_size // (num_microbatches * mesh.data)
    is_piped = mesh.pipe > 1
    layers = resolve_layers(
        config.model,
        num_ranks=mesh.pipe,
        num_chunks=sizes.num_chunks if is_piped else 1,
        num_tokens=sizes.num_tokens,
        vocab=config.pipeline.vocab,
    )
    return replace(
        sizes,
        mesh=mesh,
        num_microbatches=num_microbatches,
        num_sequences=num_sequences,
        layers_per_stage=layers,
        vocab=config.pipeline.vocab,
    )


class _Estimate:
    """Sizes of a config on a device; the ratio of two configs scales the measured memory of one to the other."""

    def __init__(self, config: RunConfig, mesh: MeshSpec, sizes: StepSizes) -> None:
        # One program runs on all ranks, so each has room for as many layers as the largest stage.
        room = sizes.layer_slots
        parts = mesh.pipe if sizes.vocab == "split" else 1
        table, rest = vocabulary_params(config.model, parts=mesh.tensor * parts)
        split = {"tensor": mesh.tensor, "expert": mesh.expert}
        blocks = sum(count * block_params(kind, **split) for kind, count in room)
        self.num_params = blocks + table + rest
        self.matrices = blocks * _BFLOAT16 if config.model.dtype == "bfloat16" else 0
        # Split over data are moments, parameters and gradients, in this order, by how much is sharded.
        split = [sizes.shards if SHARDS.index(config.train.shard) > number else 1 for number in range(3)]
        self.num_moments, self.num_kept, self.num_sums = (self.num_params / parts for parts in split)
        if config.train.offload == "optimizer":
            self.num_moments = 0.0
        own, every = (
            [_layer_bytes(kind, mesh, sizes, remat) for kind, _ in room] for remat in (config.pipeline.remat, "none")
        )
        kept = sum(count * each for (_, count), each in zip(room, own, strict=True))
        self.activations = kept * _num_slots(config, mesh) / config.pipeline.chunks
        held = min(sizes.tokens, chunk_tokens(config.model.hidden_size))
        logits = held * words_of_part(config.model, parts=mesh.tensor * parts) * _FLOAT32
        self.working = _WORKING_COPIES * (max(every) + logits)

    def total(self, memory: Memory, before: "_Estimate") -> int:
        """Return the bytes of this config, scaled from the compiled step of the config `before`."""
        state = memory.parameters * self.num_kept / before.num_kept
        state += memory.gradients * self.num_sums / before.num_sums
        moments = memory.optimizer * self.num_moments / before.num_moments if before.num_moments else 0.0
        activations = memory.activations * self.activations / before.activations
        # Each part is taken from what the parts before it leave, so that all three add up to the measured memory.
        matrices = min(memory.temporary, before.matrices)
        working = min(memory.temporary - matrices, before.working)
        copies = (memory.temporary - matrices - working) * self.activations / before.activations
        matrices *= self.matrices / before.matrices if before.matrices else 1
        return int(state + moments + activations + matrices + working * self.working / before.working + copies)


def _layer_bytes(model: ModelConfig, mesh: MeshSpec, sizes: StepSizes, remat: Remat) -> int:
    """Return the bytes of residuals of one layer for one microbatch; with remat "none", of all its arrays."""
    return activation_bytes(
        model,
        num_sequences=sizes.num_sequences,
        num_tokens=mesh.tokens_of_rank(sizes.num_tokens),
        tensor=mesh.tensor,
        sequence="on" if sizes.is_sequence_parallel else "off",
        remat=remat,
        key_ranks=kept_ranks(sizes.context_attention, context=mesh.context, remat=remat),
    ).layer


def _num_slots(config: RunConfig, mesh: MeshSpec) -> int:
    """Return the number of microbatches whose residuals a chunk of layers holds at a time."""
    section = config.pipeline
    if mesh.pipe == 1 or section.schedule.endswith(".csv"):
        return 1
    schedule = build_schedule(
        section.schedule,
        num_ranks=mesh.pipe,
        num_microbatches=section.microbatches,
        num_chunks=section.chunks,
        max_in_flight=section.max_in_flight or None,
        vocab=section.vocab,
    )
    offload = "residuals" if config.train.offload == "residuals" else "none"
    return lower(schedule, offload=offload).num_residual_slots
