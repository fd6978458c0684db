"""Computations are started one after another, and few of them are unfinished at a time."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trellax.meshes import MeshSpec
from trellax.train import evaluate_files
from trellax.train.data.in_turn import MOST_IN_FLIGHT, in_turn

from ...commands.crafted import add_tokenizer
from ...hub.hub import GOLDEN


class Started:
    """A computation that notes when it is waited for, as an array of jax is."""

    def __init__(self, number: int, unfinished: set[int]) -> None:
        self.number, self.unfinished = number, unfinished
        unfinished.add(number)

    def block_until_ready(self) -> "Started":
        self.unfinished.discard(self.number)
        return self


def test_few_computations_are_unfinished_at_a_time() -> None:
    unfinished: set[int] = set()
    most = 0

    def start() -> Iterator[Started]:
        nonlocal most
        for number in range(100):
            yield Started(number, unfinished)
            most = max(most, len(unfinished))

    assert [one.number for one in in_turn(start())] == list(range(100))
    assert 1 < most < MOST_IN_FLIGHT


@pytest.mark.slow
def test_a_long_file_is_evaluated_on_fake_devices(tmp_path: Path) -> None:
    """Hundreds of batches: with 32 of them started at once XLA for CPUs stood still, and ended the process."""
    shutil.copytree(GOLDEN / "llama3", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "long.txt").write_text("".join(chr(33 + index * index % 60) for index in range(20_001)))
    given: dict[str, Any] = {"seq_len": 16, "batch_size": 2}
    split, alone = (
        evaluate_files(tmp_path / "model", [tmp_path / "long.txt"], mesh=MeshSpec.parse(mesh), **given)[0]
        for mesh in ("tensor=2,pipe=2", "data=1")
    )
    assert split.num_tokens == 20_000
    assert split.loss == pytest.approx(alone.loss, rel=2e-5)
