"""An engine whose mesh does not divide the vocabulary answers as one device, greedy or drawn."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.serve import Engine, Request
from trellax.serve.sampling.allowed import drop_forbidden

from ..models import mesh_of, model_of, params_on, settings_of

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 20, "frequency_penalty": 0.5},
    "drawn": {"temperature": 5.0, "seed": 3, "logprobs": 20},
    "cut": {"temperature": 2.0, "seed": 4, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "logit_bias": ((12, 3.0),)},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=4", "tensor=2,pipe=2", "data=2,tensor=4"])
def test_answers_are_those_of_one_device(mesh: str) -> None:
    """13 words, fewer than the likeliest that may be asked for: on four devices the last has padding alone."""
    config = model_of("gpt", vocab_size=13)
    requests = [Request(prompt=(1, 5, 9), max_new_tokens=8, **own) for own in SETTINGS.values()]
    found = []
    for own in ("data=1", mesh):
        there = mesh_of(own)
        engine = Engine(config, params_on(config, there), mesh=there, slots=8, chunk=4, rounds=3)
        found.append(engine.generate(requests))
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        assert max(other.tokens) < 13
        for ours, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=2e-5)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_no_constraint_allows_padding() -> None:
    """40 words padded to 96: the bits that are given end at 64."""
    settings = settings_of(1, is_constrained=True)
    allowed = np.full((1, 2), 0xFFFFFFFF, np.uint32) >> np.array([[0, 24]], np.uint32)
    found = np.asarray(drop_forbidden(jnp.zeros((1, 96)), settings, jnp.asarray(allowed), axes=()))
    assert (found[0, :40] == 0).all()
    assert np.isneginf(found[0, 40:]).all()
