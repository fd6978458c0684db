"""Answers with guesses are those without, greedy or drawn, on any mesh; guesses that are right save passes."""

from typing import Any

import numpy as np
import pytest
from trellax.meshes import ServeError
from trellax.serve import Engine, Request, Speculation, Usage

from ..models import STYLES, answer_of, engine_on, logits_of, mesh_of, model_of, numbers_of, params_on, requests_of

REPEATING = [Request(prompt=(1, 2, 3, 4) * 3, max_new_tokens=11), Request(prompt=(9,), max_new_tokens=20)]


def draft_of(style: str, mesh: str, *, like: str = "same") -> tuple[Any, Any]:
    """The model itself, which is always right; or one of another width, which is never."""
    config = model_of(style) if like == "same" else model_of(style, hidden_size=16, num_layers=1)
    return config, params_on(config, mesh_of(mesh))


def check(mesh: str, style: str, kind: str, speculation: Speculation, **sizes: Any) -> Usage:
    """Answers equal those of full recomputation on one device; the engine's usage."""
    engine = engine_on(mesh, style, speculation=speculation, **sizes)
    requests = [*REPEATING, *requests_of(kind)] if kind != "changed" else requests_of(kind)
    found = [(answer.tokens, answer.finish_reason) for answer in engine.generate(requests)]
    assert found == [answer_of(model_of(style), request) for request in requests]
    pools = engine.scheduler.pools
    assert sum(pool.num_free for pool in pools) == engine.sizes.pages_per_shard * engine.sizes.num_shards
    return engine.usage


def test_looked_up_guesses_change_no_answer() -> None:
    usage = check("data=1", "llama", "sampled", Speculation(tokens=3))
    assert 0 < usage.accepted_tokens < usage.guessed_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled", "changed"])
@pytest.mark.parametrize(
    ("mesh", "style"),
    [
        (mesh, style)
        for mesh in ("data=1", "tensor=2", "data=2,pipe=2", "pipe=4", "tensor=4,pipe=2")
        for style in STYLES
        # Three layers fill no four stages.
        if (mesh, style) != ("pipe=4", "uneven")
    ],
)
def test_looked_up_guesses_change_no_answer_on_all_meshes(mesh: str, style: str, kind: str) -> None:
    check(mesh, style, kind, Speculation(tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "sampled", "changed"])
@pytest.mark.parametrize("like", ["same", "other"])
@pytest.mark.parametrize("mesh", ["data=1", "tensor=2", "data=2,tensor=2"])
def test_a_draft_model_changes_no_answer(mesh: str, like: str, kind: str) -> None:
    speculation = Speculation(tokens=3, draft=draft_of("llama", mesh, like=like))
    usage = check(mesh, "llama", kind, speculation)
    if kind == "changed":
        # All of these have a penalty.
        assert usage.guessed_tokens == 0
    else:
        # A draft model that is the model draws what the model draws.
        assert (usage.accepted_tokens == usage.guessed_tokens) == (like == "same")


@pytest.mark.slow
def test_right_guesses_save_passes() -> None:
    requests, ticks = [Request(prompt=(1, 2), max_new_tokens=21)], []
    for speculation in (None, Speculation(tokens=4, draft=draft_of("llama", "data=1"))):
        engine = engine_on("data=1", speculation=speculation)
        engine.generate(requests)
        ticks.append(engine.usage.decode_ticks)
    assert ticks == [20, 4]


@pytest.mark.slow
def test_a_cancelled_sequence_ends_and_others_go_on() -> None:
    engine = engine_on("data=1", speculation=Speculation(tokens=4))
    first, second = (engine.submit(Request(prompt=(index, 2), max_new_tokens=20)) for index in (1, 5))
    engine.step()
    engine.cancel(first)
    while not engine.scheduler.is_idle:
        engine.step()
    assert first.finish_reason == "cancelled"
    assert tuple(second.tokens) == answer_of(model_of("llama"), second.request)[0]
    assert engine.scheduler.num_free_pages == engine.sizes.pages_per_shard


@pytest.mark.slow
@pytest.mark.parametrize("like", ["same", "other"])
def test_drawn_answers_have_the_distribution_of_the_model(like: str) -> None:
    """Pairs of tokens of 4,000 seeds beside exact probabilities: chi-square within four deviations of its mean."""
    config = model_of("llama", vocab_size=8)
    draft = config if like == "same" else model_of("llama", vocab_size=8, hidden_size=16, num_layers=1)
    mesh = mesh_of("data=1")
    speculation = Speculation(tokens=2, draft=(draft, params_on(draft, mesh)))
    engine = Engine(config, params_on(config, mesh), mesh=mesh, slots=64, chunk=4, page=2, speculation=speculation)
    draws = [Request(prompt=(1, 2, 3), max_new_tokens=3, temperature=5.0, seed=seed) for seed in range(4_000)]
    counts = np.zeros((8, 8))
    for answer in engine.generate(draws):
        counts[answer.tokens[1], answer.tokens[2]] += 1
    expected = exact_pairs(config, temperature=5.0) * len(draws)
    # Rare pairs count together.
    is_rare = expected < 5
    counts, expected = (np.append(x[~is_rare], x[is_rare].sum()) for x in (counts, expected))
    free = len(counts) - 1
    assert free > 20
    assert ((counts - expected) ** 2 / expected).sum() < free + 4 * (2 * free) ** 0.5
    assert engine.accepted_tokens > 0
    assert (engine.accepted_tokens == engine.guessed_tokens) == (like == "same")


def exact_pairs(config: Any, *, temperature: float) -> np.ndarray:
    """Probabilities of the second and third token of an answer, summed over the first: [V, V]."""

    def shares(tokens_BT: np.ndarray) -> np.ndarray:
        logits = logits_of(config, tokens_BT)[:, -1].astype(np.float64) / temperature
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    vocab = np.arange(8)
    first = shares(np.asarray([[1, 2, 3]]))[0]
    second = shares(np.asarray([[1, 2, 3, a] for a in vocab]))
    third = shares(np.asarray([[1, 2, 3, a, b] for a in vocab for b in vocab])).reshape(8, 8, 8)
    return np.einsum("a,ab,abc->bc", first, second, third)


def test_mistakes_are_told() -> None:
    with pytest.raises(ServeError, match="tokens=65"):
        Speculation(tokens=65)
    other = model_of("llama", vocab_size=8)
    with pytest.raises(ServeError, match="vocabulary of 8"):
        Speculation(draft=(other, numbers_of(other))).check(model_of("llama"))
