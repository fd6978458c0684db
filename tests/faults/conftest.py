"""What the tests of faults share: one zygote a file, one corpus, and the loss curve of a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from trellax.train.metrics import read_metrics

from .zygote import ROOT, Zygote


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the test file's own, with a corpus in it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    return folder


@pytest.fixture(scope="module")
def zygote(folder: Path) -> Iterator[Zygote]:
    # A cache of its own: a killed process may leave half an entry behind.
    with Zygote(folder, cache=ROOT / ".cache" / "jax" / "faults") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def tiny_words(folder: Path) -> str:
    """The command line of the smallest run; more words follow."""
    return (
        f"train tiny-dense --run.folder {folder} --data.source text --data.paths {folder / 'corpus.txt'} "
        "--train.log_every 1 --train.eval_batches 1"
    )


def losses(run_folder: Path) -> dict[int, float]:
    """Return the loss of every logged step; two lines of one step must agree."""
    found: dict[int, float] = {}
    for line in read_metrics(run_folder):
        if "loss" in line:
            assert found.setdefault(line["step"], line["loss"]) == line["loss"]
    return found
