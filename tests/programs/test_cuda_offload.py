"""Moments of the optimizer in host memory, in programs for GPUs that are not present."""

import re
from pathlib import Path
from typing import Any

import pytest
from trellax.programs.hlo import HloModule

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
