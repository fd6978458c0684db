"""A run with dropout draws by step, layer and sequence: it resumes on another mesh as if it had not stopped."""

from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.train.metrics import read_metrics

WORDS = "--model.dropout 0.2 --model.stochastic_depth 0.2 --optimizer.lr_schedule constant --optimizer.warmup_steps 0 "
WORDS += "--data.source text --data.paths corpus.txt --train.log_every 1 --pipeline.microbatches 1"
WHOLE = "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 2"


def losses(name: str, *, steps: int, more: str) -> list[float]:
    assert main(f"train tiny-dense {WORDS} --train.steps {steps} --run.name {name} {more}".split()) == 0
    return [line["loss"] for line in read_metrics(Path("runs") / name) if "loss" in line]


@pytest.mark.slow
def test_run_with_dropout_resumes_on_another_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    whole = losses("whole", steps=4, more="--mesh.data 8")
    losses("parts", steps=2, more=WHOLE)
    assert losses("parts", steps=4, more="--override --mesh.data 4 --mesh.tensor 2") == pytest.approx(whole, rel=2e-5)
    still = losses("still", steps=1, more="--mesh.data 8 --model.dropout 0 --model.stochastic_depth 0")
    assert abs(still[0] - whole[0]) > 1e-3
