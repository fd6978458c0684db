"""A client of a user's: an engine in this process, and tokens as they come."""

from collections.abc import AsyncIterator
from typing import assert_type

from trellax.hub import ModelSource, ModelTokenizer, load_tokenizer
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import AsyncEngine, Completion, Engine, Request, Usage, load_for_serving


def answer(folder: str, prompt: str) -> str:
    mesh = build_mesh(MeshSpec(tensor=2, pipe=2))
    source, params = load_for_serving(folder, mesh=mesh, dtype="bfloat16", weights="int8")
    assert_type(source, ModelSource)
    tokenizer = load_tokenizer(folder)
    assert_type(tokenizer, ModelTokenizer)
    engine = Engine(source.config, params, mesh=mesh, slots=4, on_token=None)
    ids = tuple(tokenizer.encode(prompt))
    (completion,) = engine.generate([Request(prompt=ids, max_new_tokens=8, temperature=0.7, stop=(0,))])
    assert_type(completion, Completion)
    assert_type(completion.tokens, tuple[int, ...])
    assert_type(engine.usage, Usage)
    return tokenizer.decode(completion.tokens)


async def stream(engine: Engine, prompt: tuple[int, ...]) -> AsyncIterator[int]:
    async with AsyncEngine(engine) as serving:
        async for token in serving.submit(Request(prompt=prompt)):
            yield token
