"""Write a pipeline schedule of your own: check it, price it, draw it, and train with it.

Run:     python examples/own_schedule.py     (2 CPU cores, about 15 seconds)
Expect:  two grids, their bubbles beside that of 1f1b, and one loss from all three.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from trellax.meshes import MeshSpec, ScheduleError, build_mesh, use_fake_devices
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads
from trellax.schedules import (
    Action,
    build_schedule,
    draw_picture,
    schedule_from_csv,
    schedule_from_orders,
    schedule_to_csv,
    simulate,
)

use_fake_devices(4)
RANKS, MICROBATCHES = 4, 6


# --8<-- [start:orders]
def order_of(rank: int, *, put_off: int) -> list[Action]:
    """Return what a rank runs: 1F1B with the backward in halves, weight gradients `put_off` microbatches later."""
    ahead = min(RANKS - rank, MICROBATCHES)
    words = [f"{rank}F{number}" for number in range(ahead)]
    for number in range(MICROBATCHES):
        words.append(f"{rank}I{number}")
        words += [f"{rank}W{number - put_off}"] * (number >= put_off)
        words += [f"{rank}F{number + ahead}"] * (number + ahead < MICROBATCHES)
    words += [f"{rank}W{number}" for number in range(max(0, MICROBATCHES - put_off), MICROBATCHES)]
    return [Action.parse(word) for word in words]


at_once, later = ([order_of(rank, put_off=late * rank) for rank in range(RANKS)] for late in (0, 1))
schedules = [
    schedule_from_orders(at_once, name="at-once", num_microbatches=MICROBATCHES),
    schedule_from_orders(later, name="later", num_microbatches=MICROBATCHES),
    build_schedule("1f1b", num_ranks=RANKS, num_microbatches=MICROBATCHES),
]
# --8<-- [end:orders]

# --8<-- [start:price]
for schedule in schedules:
    timing = simulate(schedule, forward=1.0, input_grad=1.0, weight_grad=1.0)
    print(f"{schedule.name}: bubble {timing.bubble_fraction:.1%}, in flight per rank {timing.peak_in_flight}")
    print(schedule, end="\n\n")
# --8<-- [end:price]
# --8<-- [start:check]
table = schedule_to_csv(schedules[1])
try:
    schedule_from_csv(table.replace("3F0,3I0", "3I0,3F0"), name="wrong")
except ScheduleError as error:
    print(error)
# --8<-- [end:check]

# --8<-- [start:files]
Path("later.csv").write_text(table)  # `trellax train CONFIG --pipeline.schedule later.csv` runs it
Path("later.svg").write_bytes(draw_picture(schedules[1], format="svg"))
# --8<-- [end:files]

# --8<-- [start:run]
mesh = build_mesh(MeshSpec(pipe=RANKS))
x_MBD = jax.random.normal(jax.random.key(0), (MICROBATCHES, 2, 32))
fns = StageFns(
    first=lambda shared, microbatch: microbatch,
    layer=lambda weight_DD, x_BD, microbatch: x_BD + jnp.tanh(x_BD @ weight_DD),
    last=lambda shared, x_BD, microbatch: jnp.sum(x_BD**2) / x_MBD.size,
)
weights = 0.1 * jax.random.normal(jax.random.key(1), (1, RANKS, 2, 32, 32))  # [chunks, ranks, layers, ...]
params = PipelineParams(stages=weights, shared={})
for schedule in schedules:
    run = jax.jit(lambda p, s=schedule: pipeline_grads(fns, params=p, batch=x_MBD, mesh=mesh, schedule=s))
    print(f"{schedule.name}: loss {run(params).loss:.6f}")
# --8<-- [end:run]
