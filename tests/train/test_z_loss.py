"""A run with a z-loss logs it beside the cross-entropy, which training and validation losses stay."""

import math
from collections.abc import Callable

import pytest
from trellax.configs import RunConfig
from trellax.train import train
from trellax.train.metrics import read_metrics

Tiny = Callable[..., RunConfig]
EXPERTS = "--model.num_experts 4 --model.experts_per_token 2 --model.expert_size 32 --model.balance_loss 0.01"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 2", f"--mesh.data 8 {EXPERTS}"]
)
def test_run_logs_the_z_loss_beside_the_cross_entropy(words: str, tiny: Tiny) -> None:
    # Nearly no step is made, so that both runs validate the same weights.
    words = f"{words} --train.steps 1 --train.log_every 1 --train.batch_size 16 --optimizer.learning_rate 1e-12"
    words += " --optimizer.warmup_steps 0"
    configs = [tiny(f"{words} --run.name c{c} --train.z_loss {c}") for c in (0.1, 0.0)]
    for config in configs:
        train(config)
    (first, *_, last), (other, *_, without) = (read_metrics(config.run_folder) for config in configs)
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert last["val_loss"] == pytest.approx(without["val_loss"], rel=1e-5)
    # Fresh logits are near 0, so that Z is the size of the vocabulary.
    assert first["z_loss"] == pytest.approx(0.1 * math.log(configs[0].model.vocab_size) ** 2, rel=0.05)
    assert first["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-3)
    assert "z_loss" not in other
