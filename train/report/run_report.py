"""Report a run before it starts: mesh, parameters with their shardings, stages, and schedule with its bubble."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ...layers import param_counts
from ...layers.lora.linears import adapted_names
from ...layers.own.counts import tell_counts
from ...meshes import MeshSpec, RunError, ScheduleError, sharding_table
from ...meshes.arguments import check_count
from ...meshes.axes import CONTEXT_ROLES, EXPERT_ROLES, KEPT_ROLES, SUMMED_ROLES
from ...meshes.host_memory import is_in_host_memory
from ...meshes.notebook import text_html
from ...meshes.terminal import fold
from ...programs.memory import device_bytes
from ...schedules import Schedule, StageCost, simulate
from ...schedules.stage_cost import is_even
from ..state import Setup
from .stage_table import ranks_of_ends, tabulate_stages

_MAX_GRID_COLUMNS = 100
_MORE = " ..."
_CONTEXT_WORDS = {
    "gather": "keys and values gathered",
    "gather-once": "keys and values gathered once, and kept",
    "ulysses": "heads exchanged",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run as texts, which `str()` and notebooks show, and as `numbers` for scripts."""

    mesh: str
    parameters: str
    stages: str
    schedule: str
    numbers: dict[str, object]

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.mesh, self.parameters, self.stages, self.schedule) if part)

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        return text_html(str(self))


def describe_run(setup: Setup, *, width: int | None = None) -> Report:
    """Return the report of a run, computed from shapes: no array is allocated.

    >>> print(describe_run(prepare(load_config("quickstart"))).mesh)
    mesh      data=2 tensor=2 pipe=2: 8 x cpu (cpu)
              tokens between layers over tensor (mesh.sequence)

    Args:
        width: largest number of columns of the texts; None for no limit.

    Raises:
        RunError: the width is not a positive whole number.
    """
    if width is not None:
        check_count("width", width, error=RunError)
    table = sharding_table(setup.model.params)
    stages = tabulate_stages(setup) if setup.schedule.num_ranks > 1 else None
    timing = simulate(setup.schedule, stages=setup.stage_costs)
    return Report(
        mesh=_tell_mesh(setup),
        parameters=f"{table.draw(width=width)}{_tell_adapters(setup)}{_tell_own(setup, width=width)}",
        stages=stages.draw(width=width) if stages else "",
        schedule=draw_schedule(setup.schedule, stages=setup.stage_costs, width=width),
        numbers={
            "mesh": str(setup.sizes),
            "split": {"tokens": _splits_tokens(setup), "shard": setup.config.train.shard},
            "devices": setup.mesh.devices.size,
            "parameters": [_row_numbers(row) for row in table.rows],
            "device_bytes": table.device_bytes,
            "trained": param_counts(setup.config.model).trained,
            "host_bytes": _host_bytes(setup),
            "average_bytes": _average_bytes(setup),
            "stages": stages.numbers if stages else [],
            "ranks_of": ranks_of_ends(setup),
            "schedule": setup.schedule.name,
            "bubble_fraction": timing.bubble_fraction,
            "peak_in_flight": list(timing.peak_in_flight),
        },
    )


def _row_numbers(row: Any) -> dict[str, object]:
    return {"name": row.name, "shape": row.shape, "bytes": row.total_bytes, "device_bytes": row.device_bytes}


def _tell_mesh(setup: Setup) -> str:
    """Return the mesh, and on lines of their own what else is split over it: tokens, the state of training."""
    sizes, shard, devices = setup.sizes, setup.config.train.shard, setup.mesh.devices.ravel()
    found = f"mesh      {sizes}: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    words, rows = setup.config.model.vocab_size, setup.model.params.shared["embed"]["table"].shape[0]
    if rows > words:
        found += f"\n          a vocabulary of {words:,} words, padded to {rows:,} rows that the mesh divides"
    found += _tell_tokens(setup)
    if sizes.data * sizes.context > 1 and shard != "none":
        how = "for each run of a chunk" if shard == "chunk" else f"by {shard}"
        what = "optimizer state" if shard == "optimizer" else f"weights and optimizer state, gathered {how},"
        found += f"\n          {what} over {_shards(sizes)} (train.shard)"
    if setup.config.train.ema:
        found += f"\n          an average of the weights, {_average_bytes(setup):,} bytes a device (train.ema)"
    if setup.is_offloaded:
        found += f"\n          moments in the memory of the host, {_host_bytes(setup):,} bytes a device (train.offload)"
    if setup.config.train.offload == "residuals":
        found += "\n          residuals whose backward is far off in the memory of the host (train.offload)"
    return found


def _tell_own(setup: Setup, *, width: int | None) -> str:
    """Return what the counts of classes of the user's rest on, "" where there are none."""
    told = tell_counts(setup.config.model)
    return f"\n{fold(told, width=width)}" if told else ""


def _tell_adapters(setup: Setup) -> str:
    """Return a line with the number of parameters that are trained, "" where all are."""
    model = setup.config.model
    counts, names = param_counts(model), ", ".join(adapted_names(model))
    if not model.lora_rank:
        return ""
    share = f"{counts.trained:,} of {counts.total:,} parameters ({counts.trained / counts.total:.2%}) are trained"
    kind = "adapters and magnitudes" if model.lora_magnitude == "on" else "adapters"
    return f"\n{share}: {kind} of rank {model.lora_rank} on {names}"


def _tell_tokens(setup: Setup) -> str:
    """Return lines about how tokens and experts are split, and sequences packed; "" if they are not."""
    sizes, found = setup.sizes, ""
    if sizes.context > 1:
        own = sizes.tokens_of_rank(setup.config.data.seq_len)
        how = _CONTEXT_WORDS[setup.context_attention]
        found += f"\n          sequences over {sizes.label(*CONTEXT_ROLES)}, {own} tokens on each, in two chunks; {how}"
    if sizes.expert > 1:
        num_experts = setup.config.model.num_experts
        found += f"\n          experts over {sizes.label(*EXPERT_ROLES)}, {num_experts // sizes.expert} on each"
    if setup.config.data.packing == "on":
        found += "\n          several documents in a sequence, attention within each (data.packing)"
    if _splits_tokens(setup):
        found += f"\n          tokens between layers over {sizes.label('tensor')} (mesh.sequence)"
    elif sizes.tensor > 1:
        found += f"\n          tokens between layers whole on each device of {sizes.label('tensor')} (mesh.sequence)"
    return found


def _shards(sizes: MeshSpec) -> str:
    """Return the axes over which weights are kept split, and those of experts, whose copies are fewer."""
    over = sizes.label(*SUMMED_ROLES)
    if sizes.expert == 1:
        return over
    has_copies = sizes.data * sizes.context > sizes.expert
    return f"{over}, those of experts {f'over {sizes.label(*KEPT_ROLES)}' if has_copies else 'no further'}"


def _splits_tokens(setup: Setup) -> bool:
    return setup.sizes.splits_tokens(setup.config.data.seq_len)


def _host_bytes(setup: Setup) -> int:
    """Return the bytes that each device keeps in the memory of its host."""
    if not setup.is_offloaded:
        return 0
    return device_bytes([leaf for leaf in jax.tree.leaves(setup.shapes.opt_state) if is_in_host_memory(leaf)])


def _average_bytes(setup: Setup) -> int:
    """Return the bytes of the average of the weights on each device, or in the memory of its host."""
    return device_bytes(jax.tree.leaves(setup.shapes.opt_state[-1])) if setup.config.train.ema else 0


def draw_schedule(schedule: Schedule, *, stages: Sequence[StageCost] | None = None, width: int | None = None) -> str:
    """Draw a schedule: a line with its bubble and peak of microbatches in flight, and its grid, cut to the width.

    Args:
        stages: time of every stage; equal times if left out.
        width: largest number of columns; None for a grid of at most 100.

    Raises:
        ScheduleError: the width is not a positive whole number.
    """
    if width is not None:
        check_count("width", width, error=ScheduleError)
    if schedule.num_ranks == 1:
        return f"schedule  one stage, microbatches one after another ({schedule.num_microbatches}): no bubble"
    timing = simulate(schedule, stages=stages)
    uneven = "" if stages is None or is_even(stages) else " with these stages"
    peaks = ", ".join(map(str, timing.peak_in_flight))
    head = (
        f"schedule  {schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches, bubble "
        f"{timing.bubble_fraction:.1%} of the time{uneven}, in flight per rank {peaks}"
    )
    lines = str(schedule).splitlines()
    room = min(_MAX_GRID_COLUMNS, max(0, (width or _MAX_GRID_COLUMNS + len(_MORE)) - len(_MORE)))
    grid = [f"{line[:room]}{_MORE}" if len(lines[0]) > room + len(_MORE) else line for line in lines]
    return "\n".join([fold(head, width=width), *grid])
