"""Moments of the optimizer in host memory, in programs for GPUs that are not present."""

import re
from pathlib import Path
from typing import Any

import pytest
from trellax.programs.hlo import Array, Computation, HloModule

from .test_cuda import inspect

pytestmark = pytest.mark.cuda

TWO_AXES = "llama3-8b-8gpu h200:8 --pipeline.microbatches 8 --train.batch_size 8"
EIGHT_SHARDS = (
    "llama3-8b-8gpu h200:8 --mesh.data 8 --mesh.tensor 1 --mesh.pipe 1 --train.shard layer --train.batch_size 8"
)
PARTS, OF_A_LAYER, OF_THE_ENDS = 8, 9, 3
"""Parts of the layers; the parameters of a layer (q, k, v, o, up, gate, down, two norms), and of embedding and head."""

NAMES = re.compile(r"(dynamic-slice|dynamic-update-slice|copy)-start\b")


@pytest.mark.parametrize("words", [TWO_AXES, f"{EIGHT_SHARDS} --pipeline.microbatches 1"])
def test_device_bytes_fall_by_the_moments_which_are_copied_after_the_loops(words: str, tmp_path: Path) -> None:
    path = tmp_path / "step.hlo"
    whole: Any = inspect(words)
    parts: Any = inspect(f"{words} --train.offload optimizer", hlo=str(path))
    before, after = whole["memory_bytes"], parts["memory_bytes"]
    assert after["host"] == pytest.approx(2 * before["parameters"])
    assert before["total"] - after["total"] == pytest.approx(after["host"], rel=0.01)
    entry = [i.name for i in HloModule.parse(path.read_text()).entry.instructions.values()]
    starts = [found[1] for name in entry if (found := NAMES.match(name))]
    # Two moments of each parameter, in and out.
    assert starts.count("dynamic-slice") == starts.count("dynamic-update-slice") == 2 * PARTS * OF_A_LAYER
    assert starts.count("copy") == 2 * 2 * OF_THE_ENDS
    # None begins while gradients are computed: the loops over microbatches are before the first.
    loops = [place for place, name in enumerate(entry) if name.startswith("while")]
    assert max(loops) < next(place for place, name in enumerate(entry) if NAMES.match(name))
    # The moments of the second part come when those of the first have gone.
    first_out = next(place for place, name in enumerate(entry) if name.startswith("dynamic-update-slice-done"))
    assert sum(name.startswith("dynamic-slice-start") for name in entry[:first_out]) == 2 * OF_A_LAYER


EIGHT_RANKS = (
    "llama3-8b-8gpu h200:8 --mesh.tensor 1 --mesh.pipe 8 --pipeline.microbatches 32 --train.batch_size 32 "
    "--pipeline.remat dots"
)
SLOTS_BEFORE, SLOTS_AFTER, IN_TRANSIT = 16, 3, 2
"""Slots of residuals by the tables of 1F1B with overlap, and a copy under way each way."""


def test_residuals_leave_the_device_as_the_tables_say_and_are_copied_beside_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "step.hlo"
    here: Any = inspect(EIGHT_RANKS)
    there: Any = inspect(f"{EIGHT_RANKS} --train.offload residuals", hlo=str(path))
    before, after = here["memory_bytes"], there["memory_bytes"]
    # 15 slots on the host, and one for ranks that copy nothing.
    slot = after["host"] / 16
    expected = before["total"] - (SLOTS_BEFORE - SLOTS_AFTER - IN_TRANSIT) * slot
    assert after["total"] == pytest.approx(expected, rel=0.05)
    program = HloModule.parse(path.read_text())
    bodies = [body for body in program.computations.values() if "store-start" in steps_of(body)]
    # Before the steady state, in it, and after it.
    assert len(bodies) == 3
    for body in bodies:
        steps = steps_of(body)
        # Two arrays, of bfloat16 and of float32, each way; never the whole buffer.
        assert [steps.count(step) for step in ("load-start", "store-start", "copy")] == [2, 2, 0]
        assert "work" in between(steps, "store-start", "store-done")
    # In the steady state XLA ends the loads before the forward begins.
    assert ["work" in between(steps_of(body), "load-start", "load-done") for body in bodies].count(True) == 2


def steps_of(body: Computation) -> list[str]:
    """The copies of a loop's body in their order, and what takes long between them."""
    found = []
    for one in body.instructions.values():
        copy = re.match(r"dynamic-(update-)?slice-(start|done)", one.name)
        if copy:
            found.append(f"{'store' if copy[1] else 'load'}-{copy[2]}")
        elif one.opcode in ("conditional", "while"):
            found.append("work")
        elif one.opcode == "copy" and isinstance(one.type, Array) and one.type.is_on_host:
            found.append("copy")
    return found


def between(steps: list[str], start: str, done: str) -> list[str]:
    """What stands between the last start and the first end of copies in one direction."""
    last = len(steps) - 1 - steps[::-1].index(start)
    return steps[last : steps.index(done)]
