"""A mixture of experts trains: below the dense model of its active size, with its router's metrics on record."""

import json
from pathlib import Path

import pytest
from trellax.configs import load_config
from trellax.train import train

DENSE = (
    "--model.num_experts 0 --model.experts_per_token 0 --model.expert_size 0 --model.ffn_size 128 "
    "--model.balance_loss 0.0 --model.router_z_loss 0.0"
)


def run(tmp_path: Path, words: str) -> list[dict[str, float]]:
    config = load_config("tiny-moe", [*words.split(), "--run.folder", str(tmp_path), "--train.log_every", "5"])
    train(config)
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_router_metrics_are_recorded(tmp_path: Path) -> None:
    mesh = (
        "--mesh.data 2 --mesh.expert 2 --mesh.pipe 2 --train.steps 10 --optimizer.warmup_steps 1 --model.num_layers 2"
    )
    *_, last = (line for line in run(tmp_path, mesh) if "loss" in line)
    # The balance loss of each of two layers is at least its factor.
    assert 0.002 < last["router_loss"] < 0.01
    assert 1.0 <= last["expert_peak"] <= 4.0
    assert last["dropped"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_learn_more_than_the_dense_model_of_their_active_size(tmp_path: Path) -> None:
    one = "--mesh.data 8 --train.steps 150 --train.eval_batches 8"
    losses = {}
    for name, words in {"experts": one, "dense": f"{one} {DENSE} --run.name dense"}.items():
        losses[name] = [line["val_loss"] for line in run(tmp_path / name, words) if "val_loss" in line][-1]
    assert losses["experts"] < losses["dense"]
