"""AdamW decays only matrices, warms up, and its state is sharded like the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from trellax.configs import load_config
from trellax.pipeline import PipelineParams
from trellax.train import make_learning_rate, make_optimizer


def test_learning_rate_warms_up_to_its_peak_and_decays_to_its_floor() -> None:
    section = load_config("tiny-dense").optimizer
    rate = make_learning_rate(section, steps=20)
    rates = [float(rate(step)) for step in range(21)]
    assert 0 < rates[0] < rates[1] < rates[2] == pytest.approx(section.learning_rate)
    assert rates[20] == pytest.approx(section.learning_rate * section.min_lr_ratio)


@pytest.mark.parametrize("overrides", [["--optimizer.warmup_steps=0"], ["--optimizer.warmup_steps=20"]])
def test_learning_rate_is_never_zero(overrides: list[str]) -> None:
    rate = make_learning_rate(load_config("tiny-dense", overrides).optimizer, steps=20)
    assert all(float(rate(step)) > 0 for step in range(20))


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ("linear", [0.25, 0.5, 0.75, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd --optimizer.decay_steps 3", [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.4]),
        ("wsd --optimizer.warmup_steps 0 --optimizer.decay_steps 9", [1, *(1 - i / 15 for i in range(10))]),
        ("linear --optimizer.warmup_steps 9", [*(0.1 + i / 10 for i in range(10)), 0.4]),
    ],
)
def test_learning_rate_follows_its_schedule(words: str, shares: list[float]) -> None:
    words = f"--optimizer.warmup_steps 3 --optimizer.min_lr_ratio 0.4 --optimizer.lr_schedule {words}"
    section = load_config("tiny-dense", words).optimizer
    rate = make_learning_rate(section, steps=len(shares) - 1, peak=2.0)
    assert [float(rate(step)) for step in range(len(shares))] == pytest.approx([2 * share for share in shares])


def test_weight_decay_leaves_norms_and_biases_unchanged() -> None:
    optimizer: Any = make_optimizer(load_config("tiny-dense").optimizer, steps=20)
    params = PipelineParams(
        stages={"up": {"kernel": jnp.ones((1, 1, 1, 2, 2)), "bias": jnp.ones((1, 1, 1, 2))}},
        shared={"embed": {"table": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}},
    )
    grads = PipelineParams(
        stages={"up": {"kernel": jnp.zeros((1, 1, 1, 2, 2)), "bias": jnp.zeros((1, 1, 1, 2))}},
        shared={"embed": {"table": jnp.zeros((2, 2))}, "norm": {"scale": jnp.zeros(2)}},
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert float(updates.stages["up"]["kernel"].max()) < 0
    assert float(updates.shared["embed"]["table"].max()) < 0
    assert float(jnp.abs(updates.stages["up"]["bias"]).max()) == 0
    assert float(jnp.abs(updates.shared["norm"]["scale"]).max()) == 0


def test_muon_leaves_vectors_named_kernel_to_adamw() -> None:
    optimizer: Any = make_optimizer(load_config("tiny-dense", ["--optimizer.kind=muon"]).optimizer, steps=20)
    stages = {"up": {"kernel": jnp.ones((1, 1, 2, 4, 4))}, "own": {"kernel": jnp.ones((1, 1, 2, 4))}}
    state = optimizer.init(PipelineParams(stages=stages, shared={}))[1].inner_states
    muon, adamw = ({leaf.shape for leaf in jax.tree.leaves(state[name]) if leaf.ndim > 1} for name in ("muon", "adamw"))
    assert (muon, adamw) == ({(1, 1, 2, 4, 4)}, {(1, 1, 2, 4)})
