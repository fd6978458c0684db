"""Mistakes in engines and requests are errors with a fix, before anything is allocated."""

from collections.abc import Callable
from typing import Any

import pytest
from trellax.meshes import MeshSpec, TrellaxError
from trellax.serve import Engine, Request, check_model, check_request, param_shapes
from trellax.serve.state import Sizes

from .models import mesh_of, model_of

CONFIG = model_of("llama", max_tokens=64)
EXPERTS, SPLIT = model_of("experts", num_heads=16, head_size=4, expert_size=24), MeshSpec.parse("tensor=2,expert=3")
SEQUENCES, BOTH = MeshSpec.parse("context=2"), MeshSpec.parse("context_expert=2")
SIZES: dict[str, Any] = {
    "slots": 8,
    "max_tokens": 64,
    "groups": 2,
    "num_shards": 2,
    "chunk": 4,
    "items": 2,
    "rounds": 2,
}


def ask(*prompt: int, max_tokens: int = 16, **changes: Any) -> None:
    """Check one request."""
    check_request(Request(prompt=prompt or (1, 2, 3), **changes), CONFIG, max_tokens=max_tokens)


MISTAKES: dict[str, Callable[[], Any]] = {
    "empty_prompt": lambda: Request(prompt=()),
    "no_new_tokens": lambda: Request(prompt=(1,), max_new_tokens=0),
    "negative_temperature": lambda: Request(prompt=(1,), temperature=-0.5),
    "temperature_too_large": lambda: Request(prompt=(1,), temperature=1e39),
    "fraction_for_a_token": lambda: Request(prompt=(1, 1.5)),  # type: ignore[arg-type]
    "text_for_tokens": lambda: Request(prompt="def f(", stop=(1,)),  # type: ignore[arg-type]
    "top_p_of_zero": lambda: Request(prompt=(1,), top_p=0.0),
    "min_p_above_one": lambda: Request(prompt=(1,), min_p=1.5),
    "repetition_penalty_of_zero": lambda: Request(prompt=(1,), repetition_penalty=0.0),
    "frequency_penalty_too_large": lambda: Request(prompt=(1,), frequency_penalty=2.5),
    "too_many_logprobs": lambda: Request(prompt=(1,), logprobs=21),
    "bias_that_is_no_number": lambda: Request(prompt=(1,), logit_bias={1: "x"}),  # type: ignore[arg-type]
    "bias_too_large": lambda: Request(prompt=(1,), logit_bias={1: 101.0}),  # type: ignore[arg-type]
    "too_many_biases": lambda: Request(prompt=(1,), logit_bias=[(token, 1.0) for token in range(301)]),  # type: ignore[arg-type]
    "bias_of_a_token_not_in_vocabulary": lambda: ask(max_new_tokens=4, logit_bias={64: 1.0}),
    "negative_top_k": lambda: Request(prompt=(1,), top_k=-1),
    "seed_too_large": lambda: Request(prompt=(1,), seed=2**32),
    "answer_longer_than_the_cache": lambda: ask(max_new_tokens=14),
    "prompt_longer_than_the_cache": lambda: ask(*range(20), max_new_tokens=4),
    "token_not_in_vocabulary": lambda: ask(1, 64, max_new_tokens=4),
    "too_many_stops": lambda: ask(max_new_tokens=4, stop=tuple(range(9))),
    "cache_longer_than_the_model": lambda: check_model(CONFIG, {"data": 1, "tensor": 1, "pipe": 1}, max_tokens=65),
    "heads_over_tensor": lambda: check_model(CONFIG, {"data": 1, "tensor": 3, "pipe": 1}, max_tokens=64),
    "layers_over_pipe": lambda: check_model(CONFIG, {"data": 1, "tensor": 1, "pipe": 5}, max_tokens=64),
    "split_sequences": lambda: check_model(CONFIG, SEQUENCES.sizes, max_tokens=8, axes=SEQUENCES.roles),
    "split_sequences_and_experts": lambda: check_model(EXPERTS, BOTH.sizes, max_tokens=8, axes=BOTH.roles),
    "experts_of_a_dense_model": lambda: check_model(CONFIG, SPLIT.sizes, max_tokens=8, axes=SPLIT.roles),
    "split_experts": lambda: check_model(EXPERTS, SPLIT.sizes, max_tokens=8, axes=SPLIT.roles),
    "experts_over_tensor": lambda: check_model(EXPERTS, {"data": 1, "tensor": 16, "pipe": 1}, max_tokens=8),
    "slots_over_groups": lambda: Sizes(**SIZES | {"slots": 6}),
    "negative_groups": lambda: Sizes(**SIZES | {"slots": 0, "groups": -2}),  # slots are made from groups
    "cache_shorter_than_a_sequence": lambda: Sizes(**SIZES | {"page": 8, "cache_tokens": 120}),
    "no_chunk": lambda: Sizes(**SIZES | {"chunk": 0}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_error_has_a_fix(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TrellaxError) as caught:
        MISTAKES[name]()
    golden(f"errors/serve/serve_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_an_engine_refuses_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellax.serve.engine.compile_programs", lambda *args, **kwargs: pytest.fail("compiled"))
    with pytest.raises(TrellaxError, match="max_tokens=99"):
        Engine(CONFIG, None, mesh=mesh_of("data=1"), max_tokens=99)


def test_one_request_that_does_not_fit_stops_all_before_any_is_run() -> None:
    config = CONFIG
    engine = object.__new__(Engine)
    engine.config, engine.sizes = config, Sizes(**SIZES)
    engine.step = lambda: pytest.fail("ran")  # type: ignore[method-assign]
    with pytest.raises(TrellaxError, match="max_new_tokens=64"):
        engine.generate([Request(prompt=(1,), max_new_tokens=2), Request(prompt=(1,), max_new_tokens=64)])


def test_shapes_are_asked_for_only_where_the_model_fits() -> None:
    with pytest.raises(TrellaxError, match="num_heads=8"):
        param_shapes(CONFIG, mesh=mesh_of("tensor=3"))
