"""A run goes on from its save with another mesh and schedule, V-shaped or a loop, and its losses stay the same."""

import io
import shutil
from collections.abc import Callable

import pytest
from rich.console import Console
from trellax.configs import RunConfig
from trellax.train import train
from trellax.train.metrics import read_metrics

Tiny = Callable[..., RunConfig]

# Four layers: stages of one layer in the V, of two in the loop. test_checkpoints.py has stages that differ.
RUN = (
    "--model.dtype float32 --model.num_layers 4 --model.embeddings tied --pipeline.microbatches 4 "
    "--train.steps 6 --train.batch_size 16 --train.log_every 1 --checkpoint.every 2 --checkpoint.keep 9"
)
LOOP = "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.schedule 1f1b"
V_SHAPED = "--mesh.data 4 --mesh.pipe 2 --pipeline.schedule v-half --pipeline.chunks 2 --pipeline.vocab ends"

TOLERANCE = 1e-5  # relative; sums in another order, over six steps, in float32


def run(config: RunConfig, *, after: int = 0) -> list[float]:
    """Train to the last step, from the save after a step if there is one, and return the losses of all steps."""
    for step in range(after + 1, config.train.steps + 1):
        shutil.rmtree(config.run_folder / "checkpoints" / str(step), ignore_errors=True)
    train(config, console=Console(file=io.StringIO()))
    lines = [line for line in read_metrics(config.run_folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, config.train.steps + 1))
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_run_changes_between_a_loop_and_a_v(tiny: Tiny) -> None:
    expected = run(tiny(f"{RUN} {LOOP} --run.name loop"))
    v_shaped = run(tiny(f"{RUN} {V_SHAPED} --run.name changes"))
    assert v_shaped == pytest.approx(expected, rel=TOLERANCE)
    # The saves of steps 2 and 4: written by one schedule, read by the other.
    from_v = run(tiny(f"{RUN} {LOOP} --run.name changes"), after=2)
    assert from_v[:2] == v_shaped[:2]
    assert from_v == pytest.approx(expected, rel=TOLERANCE)
    back = run(tiny(f"{RUN} {V_SHAPED} --run.name changes"), after=4)
    assert back[:4] == from_v[:4]
    assert back == pytest.approx(expected, rel=TOLERANCE)
