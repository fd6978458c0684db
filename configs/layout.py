"""Convert the config of a run to the planner's values: its layout, and the question which layout is best for it."""

from dataclasses import replace
from typing import Any

from ..layers.context.choice import Way, choose_context_attention
from ..meshes import MeshSpec, PlanError
from ..plan.costs.layout import ZERO_STAGES, Layout
from ..plan.costs.runtime import OnOff, trellax_runtime
from ..plan.machines.topology import Topology
from ..plan.training_search import TrainQuestion
from ..schedules import SCHEDULES
from .mesh_checks import check_batch_splits
from .run_config import RunConfig


def layout_of(config: RunConfig, *, num_devices: int) -> Layout:
    """Return the layout of a config on `num_devices` devices.

    Raises:
        TrellaxError: the mesh does not fit the devices, the batch does not split, or the schedule is a file.
    """
    mesh, pipeline = config.mesh.resolve(num_devices=num_devices), config.pipeline
    check_batch_splits(config, mesh)
    if pipeline.schedule not in SCHEDULES:
        raise PlanError(
            f"pipeline.schedule={pipeline.schedule!r} is a file, and only named schedules are priced.",
            fix="use `trellax schedule --file` for its bubble, or a named schedule.",
        )
    given = pipeline.layers_per_stage
    return Layout(
        data=mesh.data,
        tensor=mesh.tensor,
        pipe=mesh.pipe,
        expert=mesh.expert,
        context=mesh.context,
        context_expert=mesh.context_expert,
        context_attention="auto" if mesh.context == 1 else _context_attention(config, mesh),
        schedule=pipeline.schedule,
        chunks=pipeline.chunks if mesh.pipe > 1 else 1,
        microbatches=pipeline.microbatches,
        sequences=config.train.batch_size // (mesh.data * pipeline.microbatches),
        remat=pipeline.remat,
        zero=ZERO_STAGES[config.train.shard],
        gathers="chunk" if config.train.shard == "chunk" else "layer",
        offload=config.train.offload,
        layers_per_stage=None if given == "auto" or mesh.pipe == 1 else given,
        max_in_flight=pipeline.max_in_flight or None,
    )


def _context_attention(config: RunConfig, mesh: MeshSpec) -> Way:
    pipeline = config.pipeline
    how: dict[str, Any] = {"remat": pipeline.remat, "asked": pipeline.context_attention}
    return choose_context_attention(config.model, tensor=mesh.tensor, context=mesh.context, **how)


def question_of(config: RunConfig, *, topology: Topology) -> TrainQuestion:
    """Return the question which layout trains the model of a config fastest on a machine, by trellax's own step.

    Raises:
        PlanError: a size is below 1.
    """
    sequence: OnOff = "off" if config.sequence == "off" else "on"
    runtime = trellax_runtime(
        config.model,
        topology.accelerator,
        vocab=config.pipeline.vocab,
        sequence=sequence,
        average="on" if config.train.ema else "off",
    )
    return TrainQuestion(
        model=config.model,
        topology=topology,
        batch_size=config.train.batch_size,
        num_tokens=config.data.seq_len,
        context=config.mesh.context,
        # Muon keeps one float32 moment of a kernel, AdamW two.
        runtime=replace(runtime, kernel_saving_bytes=4) if config.optimizer.kind == "muon" else runtime,
    )
