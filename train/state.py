"""Build what a run trains with from its config: model, schedule, optimizer, and the state that they act on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..configs.run_config import PipelineSection, RunConfig
from ..layers import ModelConfig, model_rules
from ..layers.context.choice import Way, choose_context_attention
from ..meshes import MeshSpec, ScheduleError, ShardingRules, mesh_sizes
from ..meshes.host_memory import check_host_memory, in_host_memory
from ..pipeline import PipelinedModel, PipelineParams, resolve_layers, split_transformer, stage_costs
from ..pipeline.model.frozen import keep_trained, trained_mask
from ..pipeline.model.losses import LossFn, make_next_token_loss, make_preference_loss
from ..pipeline.model.own_block import without_layer_losses
from ..pipeline.model.param_specs import gathered, split_over_batch
from ..schedules import Placement, Schedule, StageCost, build_schedule, load_schedule
from .step_health import StepHealth, initial_health
from .update.offload import join_params, map_params, zero_moments
from .update.optimizer import AverageState, make_optimizer, optimizer_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state that a step changes and a checkpoint holds; also the tree of its shapes, and of its shardings.

    `step` int32[] counts the steps taken. It is also the position in the data, since batches are a function of seed
    and step. `opt_state` is optax's, which counts its updates itself: skipped batches make none. `params` are
    `stages`, leaves [chunks, ranks@pipe, layers, ...], and `shared`, the embedding and the head. A save names its
    arrays by these fields, so renaming one makes old saves unreadable.
    """

    step: Any
    params: PipelineParams
    opt_state: Any
    health: StepHealth


@dataclass(frozen=True)
class Setup:
    """A config on a mesh, and what follows from both: model, schedule, optimizer, shapes and shardings.

    Everything is built when it is first asked for, and nothing is allocated on a device before `init_state`.

    >>> setup = Setup(load_config("quickstart"), build_mesh(MeshSpec(data=-1)))
    >>> setup.init_state().params.shared["embed"]["table"].shape
    (256, 128)

    Raises:
        TrellaxError: model, mesh and schedule do not fit each other.
    """

    config: RunConfig
    mesh: Mesh

    def check(self) -> None:
        """Build model and schedule, and check what is asked of the host, before any array is made.

        Raises:
            TrellaxError: they do not fit each other, or devices or jaxlib cannot keep arrays on the host.
        """
        _ = self.model, self.schedule
        if self.config.train.offload != "none":
            check_host_memory(self.mesh, asked=f"train.offload={self.config.train.offload!r}")

    @cached_property
    def sizes(self) -> MeshSpec:
        """The sizes of the mesh, with the roles that the config gives its axes."""
        return mesh_sizes(self.mesh, axes=self.config.mesh.roles, sequence=self.config.sequence)

    @property
    def rules(self) -> ShardingRules:
        """The mesh axes of each logical dimension, before they are fitted to the model."""
        return ShardingRules.of(self.sizes.roles)

    @cached_property
    def model(self) -> PipelinedModel:
        """The transformer cut into stages."""
        return self._cut(self.config.model, z_loss=self.config.train.z_loss)

    @cached_property
    def model_without_added_losses(self) -> PipelinedModel:
        """The same for validation, whose loss is that of the text alone."""
        config = self.config.model
        if config.num_experts:
            config = replace(config, balance_loss=0.0, router_z_loss=0.0)
        is_same = config is self.config.model and not self.config.train.z_loss
        model = self.model if is_same else self._cut(config, z_loss=0.0)
        return replace(model, fns=without_layer_losses(model.fns)) if config.block else model

    def _cut(self, config: ModelConfig, *, z_loss: float) -> PipelinedModel:
        rules = model_rules(config, self.mesh.shape, rules=self.rules)
        rules = rules.split_stream() if self.sizes.splits_tokens(self.config.data.seq_len) else rules
        rules = rules.exchange_heads() if self.context_attention == "ulysses" else rules
        rules = rules.keep_keys() if self.context_attention == "gather-once" else rules
        return split_transformer(
            config,
            mesh=self.mesh,
            remat=self.config.pipeline.remat,
            unroll=self.config.pipeline.unroll,
            rules=rules,
            num_chunks=self.num_chunks,
            layers_per_stage=self.layers_per_stage if self.sizes.pipe > 1 else None,
            placement=self.placement,
            vocab=self.config.pipeline.vocab,
            shard="none" if self.config.train.shard == "optimizer" else self.config.train.shard,
            loss=self._loss(z_loss),
        )

    def _loss(self, z_loss: float) -> LossFn:
        return make_preference_loss(self.config.train.dpo_beta) if self._is_of_pairs else make_next_token_loss(z_loss)

    @property
    def _is_of_pairs(self) -> bool:
        return self.config.data.source == "pairs"

    @property
    def context_attention(self) -> Way:
        """How context ranks attend to each other's tokens."""
        sizes, pipeline = self.sizes, self.config.pipeline
        how: dict[str, Any] = {"remat": pipeline.remat, "asked": pipeline.context_attention}
        return choose_context_attention(self.config.model, tensor=sizes.tensor, context=sizes.context, **how)

    @property
    def placement(self) -> Placement:
        """The rank of every stage, which follows from the schedule."""
        return self.schedule.placement

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of layers per rank: 1 without a pipeline; a schedule read from a file has its own number."""
        if self.sizes.pipe == 1:
            return 1
        return self._file_schedule.num_chunks if self._file_schedule else self.config.pipeline.chunks

    @cached_property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Number of layers of every stage, first to last: given by the config, or balanced by their time."""
        if self.sizes.pipe == 1:
            return (self.config.model.num_layers,)
        return resolve_layers(
            self.config.model,
            num_ranks=self.sizes.pipe,
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
        """The order of forwards and backwards on every rank."""
        section, num_ranks = self.config.pipeline, self.sizes.pipe
        if num_ranks == 1:
            # With one rank every schedule is the same: gradient accumulation, one microbatch after another.
            accumulation = build_schedule("gpipe", num_ranks=1, num_microbatches=section.microbatches)
            return replace(accumulation, name=section.schedule)
        return self._file_schedule or build_schedule(
            section.schedule,
            num_ranks=num_ranks,
            num_microbatches=section.microbatches,
            num_chunks=section.chunks,
            max_in_flight=section.max_in_flight or None,
            vocab=section.vocab,
            stages=self.stage_costs,
        )

    @cached_property
    def _file_schedule(self) -> Schedule | None:
        section = self.config.pipeline
        return _load_schedule_file(section, self.sizes) if section.schedule.endswith(".csv") else None

    @cached_property
    def peak_rate(self) -> jax.Array:
        """The peak learning rate, float32[], replicated."""
        shape, peak = self.peak_rate_shape, np.asarray(self.config.optimizer.learning_rate, np.float32)
        # One number, sent once: a user's jax_transfer_guard is meant for transfers in the training loop.
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: peak)

    @property
    def peak_rate_shape(self) -> jax.ShapeDtypeStruct:
        """Shape and sharding of `peak_rate`, to compile for devices that this machine may lack."""
        return jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(self.mesh, PartitionSpec()))

    @cached_property
    def optimizer(self) -> Any:
        """Gradient clipping and AdamW, an `optax.GradientTransformation`.

        It has the learning rate of the config as a constant; `make_train_step` makes one whose rate is an input, with
        the same state. Annotated as Any because optax's types do not admit dataclasses as parameter trees.
        """
        return make_optimizer(self.config.optimizer, steps=self.config.train.steps, ema=self.config.train.ema)

    @cached_property
    def gradient_shapes(self) -> PipelineParams:
        """Shapes of the sums of gradients in a step: split as parameters are, but for what is gathered once a step."""
        own, axes = self.model.params, self.sizes.roles
        sums = jax.tree.map(lambda leaf: leaf.update(sharding=gathered(leaf.sharding, axes)), own)
        # Embedding and head are gathered once in either case.
        return self.trained(replace(sums, stages=own.stages) if self.config.train.shard in ("chunk", "layer") else sums)

    @cached_property
    def moment_shardings(self) -> PipelineParams:
        """Shardings of AdamW's two moments and of the average of the weights.

        They are those of the parameters, with ZeRO-1 also split over the batch axes.
        """
        own, axes, is_split = self.model.shardings, self.sizes.roles, self.config.train.shard == "optimizer"
        return self.trained(split_over_batch(own, self.model.params, axes=axes) if is_split else own)

    def trained(self, tree: PipelineParams) -> PipelineParams:
        """Return a tree like the parameters with None for those that are frozen, which the optimizer does not see."""
        return keep_trained(tree, trained_mask(self.model.fns.frozen, self.model.params))

    @property
    def is_offloaded(self) -> bool:
        """Whether the moments, and the average of the weights, are kept in the memory of the host."""
        return self.config.train.offload == "optimizer"

    @property
    def kept_moment_shardings(self) -> PipelineParams:
        """Shardings of the moments between steps: in the memory of the host if they are offloaded."""
        if not self.is_offloaded:
            return self.moment_shardings
        return jax.tree.map(in_host_memory, self.moment_shardings)

    @cached_property
    def shapes(self) -> TrainState:
        """Shapes, types and shardings of the whole state, as `jax.ShapeDtypeStruct`."""
        shapes = jax.eval_shape(self._fresh, self.model.params)
        return jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, self.shardings
        )

    @cached_property
    def shardings(self) -> TrainState:
        """Shardings of the whole state."""
        opt_state = jax.eval_shape(self.optimizer.init, self.trained(self.model.params))
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return TrainState(
            step=replicated,
            params=self.model.shardings,
            opt_state=optimizer_shardings(opt_state, self.kept_moment_shardings, self.mesh),
            health=StepHealth(skipped=replicated, mean_loss=replicated, halted=replicated),
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every array of a batch: [M, B@data, T@context], tokens in the order of context ranks."""
        return NamedSharding(self.mesh, self.rules.spec(("microbatch", "batch", "tokens")))

    @property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a batch: weights float32, all else int32, each [M, B@data, T@context].

        With preferences also `reference` and `shares`, float32 [M, B@data, 1].
        """
        microbatches = self.config.pipeline.microbatches
        shape = (microbatches, self.config.train.batch_size // microbatches, self.config.data.seq_len)
        dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        if self.config.data.packing == "on":
            dtypes |= {"segments": np.int32, "positions": np.int32}
        sizes = {name: (shape, dtype) for name, dtype in dtypes.items()}
        if self._is_of_pairs:
            sizes |= dict.fromkeys(("reference", "shares"), ((*shape[:2], 1), np.float32))
        return {name: jax.ShapeDtypeStruct(*size, sharding=self.batch_sharding) for name, size in sizes.items()}

    def init_state(self) -> TrainState:
        """Return a state before the first step, its parameters drawn from the seed, each device making its own part."""
        return self.state_of(self.model.init(self.config.run.seed))

    def state_of(self, params: PipelineParams) -> TrainState:
        """Return a state before the first step with the given parameters, whose buffers are donated."""
        if not self.is_offloaded:
            return jax.jit(self._fresh, out_shardings=self.shardings, donate_argnums=0)(params)
        own = without_moments(self.shardings)
        state = jax.jit(lambda given: without_moments(self._fresh(given)), out_shardings=own, donate_argnums=0)(params)
        # One by one: all at once may not fit the devices. The moments of AdamW and Muon start from zero.
        opt_state = join_params(map_params(zero_moments, self.shapes.opt_state), state.opt_state)
        if self.config.train.ema:
            average = jax.device_put(self.trained(state.params), self.kept_moment_shardings)
            opt_state = (*opt_state[:-1], AverageState(average=average))
        return replace(state, opt_state=opt_state)

    def _fresh(self, params: PipelineParams) -> TrainState:
        opt_state = self.optimizer.init(self.trained(params))
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, health=initial_health())


def without_moments(state: TrainState) -> TrainState:
    """Return the state with None for every copy of the parameters in its optimizer state."""
    return replace(state, opt_state=map_params(lambda _: None, state.opt_state))


def _load_schedule_file(section: PipelineSection, mesh: MeshSpec) -> Schedule:
    """Load a schedule from a .csv file, and check that it fits the mesh and the number of microbatches."""
    num_ranks, key = mesh.pipe, f"mesh.{mesh.roles.pipe}"
    schedule = load_schedule(section.schedule, vocab=section.vocab)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, section.microbatches):
        raise ScheduleError(
            f"{section.schedule} is for {schedule.num_ranks} ranks and {schedule.num_microbatches} microbatches, but "
            f"{key}={num_ranks} and pipeline.microbatches={section.microbatches}.",
            fix=f"set {key}={schedule.num_ranks} and pipeline.microbatches={schedule.num_microbatches}.",
        )
    return schedule
