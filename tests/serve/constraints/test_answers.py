"""Answers that must keep to a form do, whatever the mesh and the company; and the answers beside them do not change."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trellax.hub.text_stream import ByteTokenizer
from trellax.meshes import MeshSpec, ServeError
from trellax.serve import Completion, Constraint, Engine, Request, Speculation

from ..models import changed_logits, logits_of, mesh_of, model_of, params_on
from .schemas import keeps_to, random_schema

pytest.importorskip("llguidance", reason="needs the extra constrain")

CONFIG = model_of("llama", vocab_size=256, max_tokens=224)
END = 0
"""The token that ends an answer."""

COLOURS = ("red", "green", "greenish", "blue")


def engine_with(mesh: str = "data=1", **sizes: Any) -> Engine:
    own = mesh_of(mesh)
    wanted: dict[str, Any] = {"slots": 8, "chunk": 8, "rounds": 3, "page": 8, "fill": "nan"}
    wanted |= {"tokenizer": ByteTokenizer(), "axes": MeshSpec.parse(mesh).roles}
    return Engine(CONFIG, params_on(CONFIG, own), mesh=own, **(wanted | sizes))


def requests_with_forms(count: int, *, seed: int = 0) -> tuple[list[Request], list[dict[str, Any]]]:
    """Requests for JSON, half of them greedy, some with penalties and log probabilities; and their schemas."""
    rng, requests, schemas = random.Random(seed), [], []
    for index in range(count):
        schema = random_schema(rng)
        compact = schema | {"x-guidance": {"whitespace_flexible": False}}
        how: dict[str, Any] = {
            "temperature": [0.0, 1.0][index % 2],
            "seed": index,
            "stop": [(), (END,)][index // 2 % 2],
        }
        how |= {"logprobs": [None, 3][index // 4 % 2], "presence_penalty": [0.0, 1.5][index // 3 % 2]}
        how |= {"top_k": [0, 4][index // 5 % 2], "min_p": [0.0, 0.1][index // 7 % 2]}
        prompt = tuple(rng.randrange(1, 256) for _ in range(rng.randint(1, 20)))
        requests.append(Request(prompt=prompt, max_new_tokens=200, constraint=Constraint.json_schema(compact), **how))
        schemas.append(schema)
    return requests, schemas


PLAIN = [Request(prompt=(7, 5), max_new_tokens=40), Request(prompt=(9,), max_new_tokens=60, temperature=0.8, seed=3)]


def check_forms(completions: Sequence[Completion], schemas: Sequence[dict[str, Any]]) -> None:
    for completion, schema in zip(completions, schemas, strict=True):
        # The model has no letters but bytes: a text that is cut inside of one would not decode.
        text = bytes(completion.tokens).decode()
        assert completion.finish_reason == "stop", text
        assert keeps_to(json.loads(text), schema), (text, schema)


def reference_of(request: Request, texts: Sequence[str]) -> str:
    """The greedy answer among some texts, every token by recomputing the whole sequence, and nothing of ours allows."""
    answer: list[int] = []
    while True:
        follow = {text.encode()[len(answer) :][:1] for text in texts if text.encode().startswith(bytes(answer))}
        allowed = [part[0] if part else END for part in follow]
        if allowed == [END]:
            return bytes(answer).decode()
        logits = changed_logits(logits_of(CONFIG, np.asarray([[*request.prompt, *answer]]))[0, -1], request, answer)
        token = max(allowed, key=lambda one: logits[one])
        if token == END:
            return bytes(answer).decode()
        answer.append(token)


def test_answers_keep_to_their_forms_and_others_are_what_they_are_alone() -> None:
    engine = engine_with()
    alone = engine.generate(PLAIN)
    requests, schemas = requests_with_forms(14)
    found = engine.generate([PLAIN[0], *requests, PLAIN[1]])
    assert [found[0], found[-1]] == alone
    check_forms(found[1:-1], schemas)
    wanted = [(len(one.tokens), own.logprobs) for one, own in zip(found[1:-1], requests, strict=True)]
    assert [len(one.logprobs) for one in found[1:-1]] == [0 if count is None else size for size, count in wanted]
    # Cut at its length, an answer is the beginning of one.
    (cut,) = engine.generate([Request(prompt=(1,), max_new_tokens=3, constraint=Constraint.regex("[ab]{9}"))])
    assert (cut.finish_reason, len(cut.tokens), set(cut.tokens) <= {97, 98}) == ("length", 3, True)
    # What takes no answer at all is refused where it is submitted, and an engine goes on.
    with pytest.raises(ServeError, match="unclosed group"):
        engine.submit(Request(prompt=(1,), constraint=Constraint.regex("(")))
    with pytest.raises(ServeError, match="all the tokens that can begin"):
        engine.submit(Request(prompt=(1,), stop=(97,), constraint=Constraint.regex("ab")))
    assert engine.generate(PLAIN) == alone


@pytest.mark.slow
def test_what_is_chosen_is_the_likeliest_of_what_may_follow() -> None:
    requests = [
        Request(prompt=(5, i), max_new_tokens=20, stop=(END,), constraint=Constraint.choice(COLOURS)) for i in range(6)
    ]
    requests += [replace(requests[0], logit_bias=((ord("b"), 50.0),)), replace(requests[1], presence_penalty=2.0)]
    texts = [bytes(one.tokens).decode() for one in engine_with().generate(requests)]
    assert texts == [reference_of(request, COLOURS) for request in requests]
    assert len({*texts}) > 2
    assert texts[6] == "blue"


@pytest.mark.slow
def test_two_hundred_random_schemas_are_kept_to() -> None:
    requests, schemas = requests_with_forms(200, seed=1)
    engine = engine_with()
    alone = engine.generate(PLAIN)
    found = engine.generate([PLAIN[0], *requests, PLAIN[1]])
    assert [found[0], found[-1]] == alone
    check_forms(found[1:-1], schemas)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2,pipe=2", "data=2,tensor=4", "pipe=4", "data=2,pipe=2,tensor=2"])
def test_answers_are_the_same_on_any_mesh(mesh: str) -> None:
    requests, schemas = requests_with_forms(24, seed=2)
    alone = engine_with().generate([*PLAIN, *requests])
    engine = engine_with(mesh)
    found = engine.generate([PLAIN[0], *requests, PLAIN[1]])
    check_forms(found[1:-1], schemas)
    assert [one.tokens for one in (found[0], found[-1], *found[1:-1])] == [one.tokens for one in alone]
    while not engine.scheduler.is_idle:
        engine.step()
    assert engine.scheduler.num_free_pages == engine.sizes.pages_per_shard * engine.sizes.num_shards


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_guesses_change_no_answer_that_has_a_form(draft: str) -> None:
    requests, schemas = requests_with_forms(24, seed=3)
    alone = engine_with().generate([*PLAIN, *requests])
    given = None if draft == "lookup" else (CONFIG, params_on(CONFIG, mesh_of("data=1")))
    engine = engine_with(speculation=Speculation(tokens=3, draft=given))
    found = engine.generate([*PLAIN, *requests])
    check_forms(found[2:], schemas)
    assert [one.tokens for one in found] == [one.tokens for one in alone]
    assert engine.guessed_tokens > 0


def test_an_engine_without_a_tokenizer_says_so() -> None:
    engine: Any = object.__new__(Engine)
    from trellax.serve.constraints.masks import Constraints
    from trellax.serve.slots import input_shapes
    from trellax.serve.state import Sizes

    sizes = Sizes(slots=1, max_tokens=8, groups=1, num_shards=1, chunk=4, items=1, rounds=1)
    shape = input_shapes(sizes, vocab_size=256, mesh=mesh_of("data=1")).allowed
    engine.config, engine.sizes = CONFIG, sizes
    engine.constraints = Constraints(None, vocab_size=256, shape=shape)
    with pytest.raises(ServeError, match="this engine has no tokenizer"):
        engine.check(Request(prompt=(1,), max_new_tokens=2, constraint=Constraint.regex("a")))
