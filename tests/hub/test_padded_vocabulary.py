"""A vocabulary that no mesh divides: logits, greedy tokens and files are those of transformers, as of any other."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from trellax.commands.cli import main
from trellax.hub import load_model
from trellax.serve import Request

from .hf_doubles import tensors_of
from .hub import MESHES, MODELS, build_longer, tokens_of
from .make_hf_goldens import answer
from .test_load import mesh_of
from .test_serving_source import engine_of

pytest.importorskip("transformers", reason="needs the extra `hf`: torch and transformers")
pytest.importorskip("torch", reason="needs the extra `hf`: torch and transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NUM_WORDS = 67


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_vocabulary_of_67_words_is_that_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, MODELS[name] | {"vocab_size": NUM_WORDS})
    expected = build_longer(name, tmp_path / "model", num_tokens=16, monkeypatch=monkeypatch)
    logits = answer(tmp_path / "model")
    assert logits.shape[-1] == NUM_WORDS
    for mesh in MESHES:
        model = load_model(tmp_path / "model", mesh=mesh_of(mesh), dtype="float32")
        found = nnx.jit(lambda model, tokens: model(tokens))(model, tokens_of())
        assert np.abs(found - logits).max() < 2e-4
    requests = [Request(prompt=tuple(row.tolist()), max_new_tokens=16) for row in tokens_of()]
    completions = engine_of(tmp_path / "model", "tensor=2,pipe=2").generate(requests)
    assert [list(completion.tokens) for completion in completions] == expected.tolist()
    words = ["--mesh", "tensor=4,pipe=2"]
    assert main(["import-hf", str(tmp_path / "model"), str(tmp_path / "run"), *words]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back"), *words]) == 0
    saved, back = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "back")
    assert back.keys() == saved.keys()
    assert all(np.array_equal(back[key], leaf) for key, leaf in saved.items())
