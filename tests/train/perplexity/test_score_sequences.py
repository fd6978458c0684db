"""Log-likelihoods of sequences are those of transformers, on any mesh, and in any company."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.hub.model_folder import open_model
from trellax.layers.projected_loss import projected_scores
from trellax.meshes import DataError, MeshSpec
from trellax.train.perplexity.score_sequences import Score, Scored, SequenceScorer

from ...commands.crafted import add_tokenizer
from ...hub.hub import GOLDEN, tokens_of


def make_scorer(name: str, folder: Path, mesh: str, batch_size: int = 4) -> SequenceScorer:
    shutil.copytree(GOLDEN / name, folder / name, dirs_exist_ok=True)
    add_tokenizer(folder / name)
    return SequenceScorer(open_model(folder / name), mesh=MeshSpec.parse(mesh), batch_size=batch_size, dtype="float32")


def expected(name: str, row: int, length: int, count: int) -> Score:
    """Return a score by the logits of transformers."""
    logits = np.load(GOLDEN / name / "logits.npy")[row].astype(np.float64)
    places = range(length - 1 - count, length - 1)
    own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = tokens_of()[row]
    return Score(
        logprob=sum(own[place, targets[place + 1]] for place in places),
        is_greedy=all(logits[place].argmax() == targets[place + 1] for place in places),
    )


CUTS = [(row, length, count) for row in range(2) for length, count in ((2, 1), (7, 3), (12, 11), (5, 1), (9, 8))]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama3", "data=1"),
        ("llama3", "data=2,tensor=2,pipe=2"),
        ("gpt2", "context=2,pipe=2"),
        ("mixtral", "context_expert=2"),
        ("qwen3", "tensor=2,pipe=2"),
    ],
)
def test_scores_are_those_of_transformers(name: str, mesh: str, tmp_path: Path) -> None:
    scorer = make_scorer(name, tmp_path, mesh)
    greedy = [int(np.load(GOLDEN / name / "logits.npy")[0, 3].argmax())]
    tokens = tokens_of().tolist()
    asked = [Scored(tokens=tuple(tokens[row][:length]), count=count) for row, length, count in CUTS]
    asked.append(Scored(tokens=(*tokens[0][:4], *greedy), count=1))
    found = scorer.score(asked)
    wanted = [expected(name, *cut) for cut in CUTS]
    assert [one.logprob for one in found[:-1]] == pytest.approx([one.logprob for one in wanted], abs=2e-4)
    assert [one.is_greedy for one in found] == [*(one.is_greedy for one in wanted), True]


def test_sequences_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    scorer = make_scorer("llama3", tmp_path, "data=1")
    most = scorer.max_tokens
    for tokens, count in (((1, 2), 2), ((1, 2), 0), ((1,), 1), ((1,) * (most + 2), 1)):
        with pytest.raises(DataError, match=f"{count} of {len(tokens)} tokens cannot be scored"):
            scorer.score([Scored(tokens=tokens, count=count)])
    with pytest.raises(DataError, match="token id 99999 is unknown"):
        scorer.score([Scored(tokens=(1, 99999), count=1)])
    assert scorer.score([]) == []


def test_of_equal_logits_the_first_word_is_the_likeliest() -> None:
    x, table = jnp.ones((1, 3, 4)), jnp.ones((8, 4)).at[0].set(0.0)
    scores = projected_scores(x, table, jnp.array([[0, 1, 2]]))
    assert scores.is_best.tolist() == [[False, True, False]]
    assert scores.logprob[0, 1] == pytest.approx(-np.log(7 + np.exp(-4)), rel=1e-5)
