"""Sequences are rotated by the factors of their own length, side by side, and share pages with their like alone."""

from dataclasses import replace

import pytest
from trellax.layers import ModelConfig
from trellax.serve import Engine, Request

from .models import answer_of, mesh_of, model_of, params_on
from .test_law import LONGROPE

CONFIG = model_of("llama", **LONGROPE)
PROMPT = (3, 1, 4, 1, 5, 9)
# At most 8 tokens are read, then 9 or more; the last token of an answer is not read.
SHORT, LONG = (Request(prompt=PROMPT, max_new_tokens=number) for number in (3, 12))


def with_factors(name: str) -> ModelConfig:
    """The model whose long and short factors are the same."""
    own = LONGROPE[name]
    return replace(CONFIG, rope_short_factors=own, rope_long_factors=own)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=1", "tensor=2,pipe=2"])
def test_each_sequence_is_rotated_by_its_own_length(mesh: str) -> None:
    own = mesh_of(mesh)
    engine = Engine(CONFIG, params_on(CONFIG, own), mesh=own, slots=4, chunk=4, page=2, fill="nan")
    expected = [
        answer_of(with_factors(name), request)[0]
        for name, request in (("rope_short_factors", SHORT), ("rope_long_factors", LONG))
    ]
    assert expected[0] != expected[1][:3]
    assert [one.tokens for one in engine.generate([SHORT, LONG])] == expected
    # The same prompt, and yet none of its pages.
    assert engine.usage.shared_tokens == 0
    assert [one.tokens for one in engine.generate([LONG, SHORT])] == expected[::-1]
    assert engine.usage.shared_tokens == 8
