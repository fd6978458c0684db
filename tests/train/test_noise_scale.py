"""A run logs the noise scale of its gradients, which is that of numpy from the gradients of each data shard."""

from collections.abc import Callable

import pytest
from trellax.configs import RunConfig
from trellax.configs.check import check_run
from trellax.meshes import ConfigError
from trellax.train import train
from trellax.train.metrics import read_metrics
from trellax.train.metrics.noise_scale import NoiseScale

Tiny = Callable[..., RunConfig]


def test_signal_and_spread_are_averaged_before_they_are_divided() -> None:
    scale = NoiseScale(batch_size=8, num_steps=2)
    assert scale.sequences is None
    scale.add({})
    scale.add({"signal": -3.0, "spread": 5.0})
    assert scale.sequences is None
    scale.add({"signal": 4.0, "spread": 1.0})
    assert scale.sequences == 8 * 6.0
    scale.add({"signal": 2.0, "spread": 2.0})
    assert scale.sequences == 8 * 0.5


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--mesh.data 8", "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --train.shard step"])
def test_run_logs_the_noise_scale_and_trains_as_without_it(words: str, tiny: Tiny) -> None:
    words = f"{words} --train.steps 4 --train.log_every 1 --pipeline.microbatches 2 --train.batch_size 16"
    configs = [tiny(f"{words} --run.name {name} --train.noise_scale {name}") for name in ("on", "off")]
    for config in configs:
        train(config)
    on, off = (read_metrics(config.run_folder) for config in configs)
    assert [line.get("loss") for line in on] == [line.get("loss") for line in off]
    # The first gradients of a fresh model agree: they tell the frequencies of bytes.
    assert all(0 < line["noise_scale"] < 16 for line in on if "loss" in line)
    assert not any("noise_scale" in line for line in off)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--mesh.tensor 4 --mesh.pipe 2", r"mesh\.data=1 has one, that of the batch"),
        ("--mesh.data 8 --train.shard layer", r"train\.shard='layer' sums them over shards layer by layer"),
        ("--mesh.data 4 --mesh.context 2", r"with mesh\.context above 1 no device has that of its own sequences"),
        ("--mesh.data 4 --mesh.pipe 2 --pipeline.vocab ends", r"pipeline\.vocab='ends' sums those of embedding"),
    ],
)
def test_where_no_shard_has_a_gradient_of_its_own_it_is_refused(words: str, problem: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_run(tiny(f"{words} --train.noise_scale on"), num_devices=8)
