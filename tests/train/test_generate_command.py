"""`trellax generate`: text on stdout, talk on stderr, the same on any mesh, and mistakes before weights are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import Engine, Request, param_shapes
from trellax.train import load_config
from trellax.train.checkpoint import Checkpoints
from trellax.train.cli import main
from trellax.train.run_weights import save_params
from trellax.train.serving_source import load_for_serving

PROMPTS = ["def f(", "é = 1", "x"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama with drawn weights, as `trellax train` saves it."""
    config = load_config("tiny-llama")
    rng = np.random.default_rng(0)
    shapes = param_shapes(config.model, mesh=build_mesh(MeshSpec(), devices=jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype("float32")), shapes)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_params(folder, params, config)
    return folder


@pytest.fixture
def ask(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command on the run folder; exit code, stdout and stderr."""

    def run(*words: str, folder: str | Path = run_folder) -> tuple[int, str, str]:
        code = main(["generate", str(folder), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def words_of(prompts: list[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_json_has_prompt_completion_and_tokens_the_same_on_any_mesh(ask: Any, run_folder: Path) -> None:
    how = [*words_of(PROMPTS), "--max-new-tokens", "8", "--temperature", "0.9", "--seed", "5", "--json"]
    code, out, err = ask(*how)
    assert code == 0
    found = json.loads(out)
    assert [sorted(one) for one in found] == [["completion", "finish_reason", "prompt", "token_ids"]] * 3
    assert [one["prompt"] for one in found] == PROMPTS
    assert "tokens/s" in err
    assert json.loads(ask(*how, "--mesh", "tensor=2,pipe=2", "--fake-devices", "8", "--chunk", "2")[1]) == found
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    source, params = load_for_serving(run_folder, mesh=mesh)
    engine = Engine(source.config, params, mesh=mesh, slots=1, max_tokens=16)
    requests = [
        Request(prompt=tuple(prompt.encode()), max_new_tokens=8, temperature=0.9, seed=5 + index)
        for index, prompt in enumerate(PROMPTS)
    ]
    assert [one["token_ids"] for one in found] == [list(one.tokens) for one in engine.generate(requests)]


def test_terminal_shows_prompts_with_their_answers_in_order(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]) + "\n", encoding="utf-8")
    how = ["--prompt", PROMPTS[0], "--prompts-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "9"]
    found = json.loads(ask(*how, "--json")[1])
    code, out, _ = ask(*how, "--slots", "2")
    assert code == 0
    assert out == "".join(f"{one['prompt']}{one['completion']}\n" for one in found)


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(ask: Any) -> None:
    how = ["--prompt", "def f(", "--max-new-tokens", "12", "--temperature", "2", "--json"]
    whole = json.loads(ask(*how)[1])[0]
    ascii_at = next(i for i, token in enumerate(whole["token_ids"]) if token < 128)
    first = whole["token_ids"].index(whole["token_ids"][ascii_at])
    cut = json.loads(ask(*how, "--stop", chr(whole["token_ids"][ascii_at]))[1])[0]
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][:first]


MISTAKES: dict[str, list[str]] = {
    "no_prompt": [],
    "prompt_longer_than_the_model": ["--prompt", "x" * 40],
    "prompt_longer_than_the_cache": ["--prompt", "x" * 10, "--max-new-tokens", "4", "--max-tokens", "12"],
    "heads_over_tensor": ["--prompt", "x", "--mesh", "tensor=3", "--max-new-tokens", "4"],
    "layers_over_pipe": ["--prompt", "x", "--mesh", "pipe=4", "--max-new-tokens", "4"],
    "slots_over_groups": ["--prompt", "x", "--mesh", "pipe=2", "--slots", "3", "--max-new-tokens", "4"],
    "mesh_too_large": ["--prompt", "x", "--mesh", "tensor=4,data=4", "--max-new-tokens", "4"],
    "unknown_type": ["--prompt", "x", "--dtype", "bfloat6"],
    "long_stop": ["--prompt", "x", "--stop", "end"],
    "unknown_axis": ["--prompt", "x", "--mesh", "tenso=2"],
    "override": ["--prompt", "x", "--train.steps", "3"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_before_weights_are_read(
    name: str, ask: Any, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "restore_params", lambda *args: pytest.fail("read"))
    code, out, err = ask(*MISTAKES[name])
    assert (code, out) == (2, "")
    golden(f"errors/generate_{name}.txt", err)


def test_folders_without_a_model_are_told(
    ask: Any, golden: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    errors = [ask("--prompt", "x", folder=folder) for folder in ("nowhere", "empty")]
    assert [code for code, _, _ in errors] == [2, 2]
    golden("errors/generate_no_model.txt", "".join(err for _, _, err in errors))
