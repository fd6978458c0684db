"""Runs small enough to train in a test."""

from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.train import RunConfig, load_config


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a maker of configs: a bare config name and overrides as one text; the run folder is the test's own."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))

    def make(overrides: str = "", *, name: str = "tiny-llama") -> RunConfig:
        words = ["--run.folder", str(tmp_path / "runs"), "--data.source", "text", "--data.paths", str(corpus)]
        return load_config(name, [*words, *overrides.split()])

    return make
