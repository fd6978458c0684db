"""Everything a run trains with, made from its config: model, schedule, optimizer, and the state they act on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..configs.run_config import PipelineSection, RunConfig
from ..layers import model_rules
from ..meshes import ScheduleError
from ..pipeline import (
    PipelinedModel,
    PipelineParams,
    Schedule,
    StageCost,
    build_schedule,
    resolve_layers,
    split_transformer,
    stage_costs,
)
from ..pipeline.schedules import load_schedule
from .health import Health, healthy
from .optimizer import make_optimizer, optimizer_shardings, split_over_data


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step changes and a checkpoint holds: steps taken, parameters, optimizer state, health.

    `step` is also the position in the data: batches are a function of seed and step. The optimizer counts its updates
    itself; they are fewer by the batches that were left out. Also used as the tree of shapes and of shardings.
    """

    step: Any
    params: PipelineParams
    opt_state: Any
    health: Health


@dataclass(frozen=True)
class Setup:
    """A run made ready on a mesh; nothing is allocated until `init_state`.

    >>> setup = Setup(load_config("quickstart"), build_mesh(MeshSpec(data=-1)))
    >>> setup.init_state().params.shared["embed"]["table"].shape
    (256, 128)

    Raises:
        TrellaxError: model, mesh and schedule do not fit each other.
    """

    config: RunConfig
    mesh: Mesh

    @cached_property
    def model(self) -> PipelinedModel:
        """The transformer cut into stages."""
        rules = model_rules(self.config.model, self.mesh.shape)
        return split_transformer(
            self.config.model,
            mesh=self.mesh,
            remat=self.config.pipeline.remat,
            unroll=self.config.pipeline.unroll,
            rules=rules,
            num_chunks=self.num_chunks,
            layers_per_stage=self.layers_per_stage if self.mesh.shape["pipe"] > 1 else None,
            vocab=self.config.pipeline.vocab,
        )

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of layers a rank: one without a pipeline; a schedule of the user's own says it itself."""
        if self.mesh.shape["pipe"] == 1:
            return 1
        return self._own_schedule.num_chunks if self._own_schedule else self.config.pipeline.chunks

    @cached_property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of every stage, first to last: those of the config, or balanced ones."""
        if self.mesh.shape["pipe"] == 1:
            return (self.config.model.num_layers,)
        return resolve_layers(
            self.config.model,
            num_ranks=self.mesh.shape["pipe"],
            num_chunks=self.num_chunks,
            layers_per_stage=self.config.pipeline.layers_per_stage,
            num_tokens=self.config.data.seq_len,
            vocab=self.config.pipeline.vocab,
        )

    @cached_property
    def stage_costs(self) -> tuple[StageCost, ...]:
        """Time of every stage for one microbatch, in units of one layer's forward."""
        return stage_costs(
            self.config.model,
            layers_per_stage=self.layers_per_stage,
            num_tokens=self.config.data.seq_len,
            vocab=self.config.pipeline.vocab,
            remat=self.config.pipeline.remat,
        )

    @cached_property
    def schedule(self) -> Schedule:
        """The order of forwards and backwards."""
        section, num_ranks = self.config.pipeline, self.mesh.shape["pipe"]
        if num_ranks == 1:
            # A single rank runs its layers one after another, whatever the schedule.
            sequence = build_schedule("gpipe", num_ranks=1, num_microbatches=section.microbatches)
            return replace(sequence, name=section.schedule)
        return self._own_schedule or build_schedule(
            section.schedule,
            num_ranks=num_ranks,
            num_microbatches=section.microbatches,
            num_chunks=section.chunks,
            max_in_flight=section.max_in_flight or None,
            vocab=section.vocab,
            stages=self.stage_costs,
        )

    @cached_property
    def _own_schedule(self) -> Schedule | None:
        section = self.config.pipeline
        return _load(section, self.mesh.shape["pipe"]) if section.schedule.endswith(".csv") else None

    @cached_property
    def peak_rate(self) -> jax.Array:
        """The peak of the learning rate, a replicated float32 scalar."""
        shape, peak = self.peak_rate_shape, np.asarray(self.config.optimizer.learning_rate, np.float32)
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: peak)

    @property
    def peak_rate_shape(self) -> jax.ShapeDtypeStruct:
        """The shape and sharding of `peak_rate`, for programs of devices that need not be there."""
        return jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(self.mesh, PartitionSpec()))

    @cached_property
    def optimizer(self) -> Any:
        """Clipping and AdamW, an `optax.GradientTransformation`; Any, since optax's types know no dataclass trees."""
        return make_optimizer(self.config.optimizer, steps=self.config.train.steps)

    @cached_property
    def moment_shardings(self) -> PipelineParams:
        """Where the optimizer's copies of the parameter tree live: with the parameters, or split over `data` too."""
        own = self.model.shardings
        return split_over_data(own, self.model.params, self.mesh) if self.config.optimizer.zero == "on" else own

    @cached_property
    def shapes(self) -> TrainState:
        """Shapes and shardings of the whole state."""
        shapes = jax.eval_shape(self._fresh, self.model.params)
        return jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, self.shardings
        )

    @cached_property
    def shardings(self) -> TrainState:
        """Where the whole state lives."""
        opt_state = jax.eval_shape(self.optimizer.init, self.model.params)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return TrainState(
            step=everywhere,
            params=self.model.shardings,
            opt_state=optimizer_shardings(opt_state, self.moment_shardings, self.mesh),
            health=Health(skipped=everywhere, mean_loss=everywhere, halted=everywhere),
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Where a batch lives: [M, B@data, T]."""
        return NamedSharding(self.mesh, PartitionSpec(None, "data", None))

    def init_state(self) -> TrainState:
        """Return the state before the first step, every device making its own part."""
        return self.state_of(self.model.init(self.config.run.seed))

    def state_of(self, params: PipelineParams) -> TrainState:
        """Return the state before the first step with these parameters, which are given up."""
        return jax.jit(self._fresh, out_shardings=self.shardings, donate_argnums=0)(params)

    def _fresh(self, params: PipelineParams) -> TrainState:
        opt_state = self.optimizer.init(params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, health=healthy())


def _load(section: PipelineSection, num_ranks: int) -> Schedule:
    """A user's own schedule, checked to be for this mesh and batch."""
    schedule = load_schedule(section.schedule, vocab=section.vocab)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, section.microbatches):
        raise ScheduleError(
            f"{section.schedule} is for {schedule.num_ranks} ranks and {schedule.num_microbatches} microbatches, but "
            f"mesh.pipe={num_ranks} and pipeline.microbatches={section.microbatches}.",
            fix=f"set mesh.pipe={schedule.num_ranks} and pipeline.microbatches={schedule.num_microbatches}.",
        )
    return schedule
