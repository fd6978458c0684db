"""A model that Hugging Face's tools downloaded is found by its name, offline, wherever a folder is named."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.hub import load_model, read_hub_model, read_model_config
from trellax.hub.cached_folder import find_model_folder, name_of
from trellax.hub.chat.template import load_chat_template
from trellax.hub.folder import check_model_folder
from trellax.hub.model_folder import open_model
from trellax.hub.peft.read import base_of
from trellax.hub.tokenizer import load_tokenizer
from trellax.meshes import CheckpointError
from trellax.train import train

from ..commands.crafted import add_tokenizer
from .hub import GOLDEN

REVISION = "0f3c"


def download(model: Path, cache: Path, *, revision: str = REVISION) -> Path:
    """Put the files of a folder into a cache, as huggingface_hub does: links into its blobs."""
    snapshot = cache / "snapshots" / revision
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (cache / "refs" / "main").write_text(revision)
    return snapshot


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of org/tiny in a cache, which has a tokenizer and a chat template."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(GOLDEN / "llama3", "plain")
    add_tokenizer(tmp_path / "plain")
    Path("plain/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    download(Path("plain"), tmp_path / "hub/models--org--tiny")
    return tmp_path / "hub/models--org--tiny"


def test_name_path_and_cache_folder_mean_the_snapshot_of_main(cache: Path) -> None:
    snapshot = cache / "snapshots" / REVISION
    assert {find_model_folder(given) for given in ("org/tiny", cache, snapshot)} == {snapshot}
    assert {name_of(given) for given in ("org/tiny", cache, snapshot)} == {"org/tiny"}
    for given in ("org/other", "plain", "org/tiny/more", "", "../plain", "a b/c"):
        assert find_model_folder(given) == Path(given)
    Path("org/tiny").mkdir(parents=True)
    assert find_model_folder("org/tiny") == Path("org/tiny")


def test_cache_is_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(cache.parent.parent))
    assert find_model_folder("org/tiny") == cache / "snapshots" / REVISION
    monkeypatch.setenv("HF_HOME", str(cache))
    assert find_model_folder("org/tiny") == Path("org/tiny")


def test_every_reader_of_folders_takes_the_name() -> None:
    config = read_hub_model("plain").config
    assert read_model_config("org/tiny") == config == open_model("org/tiny").config
    assert load_tokenizer("org/tiny").vocab_size == load_tokenizer("plain").vocab_size
    assert load_chat_template("org/tiny") is not None
    check_model_folder("org/tiny")
    Path("adapters").mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/tiny"}
    Path("adapters/adapter_config.json").write_text(json.dumps(values))
    assert base_of("adapters") == find_model_folder("org/tiny")


def test_half_a_download_is_told(cache: Path) -> None:
    (cache / "refs" / "main").write_text("77aa")
    with pytest.raises(
        CheckpointError, match="refs/main names the revision '77aa', and snapshots has no such"
    ) as caught:
        find_model_folder("org/tiny")
    assert caught.value.fix == "download the model again: hf download org/tiny."
    (cache / "refs" / "main").write_text("../..")
    with pytest.raises(CheckpointError, match="no such folder"):
        find_model_folder("org/tiny")
    (cache / "refs" / "main").unlink()
    assert find_model_folder("org/tiny").name == REVISION
    (cache / "snapshots" / "77aa").mkdir()
    with pytest.raises(CheckpointError, match=r"has 2 revisions \(0f3c, 77aa\), and refs/main names none"):
        find_model_folder(cache)


@pytest.mark.slow
def test_commands_take_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for folder in ("plain", "org/tiny"):
        assert main(["generate", folder, "--prompt", "AB", "--max-new-tokens", "4", "--json"]) == 0
        said.append([own["token_ids"] for own in json.loads(capsys.readouterr().out)])
    assert said[0] == said[1]
    Path("text.txt").write_text("AB " * 40)
    assert main(["eval", "org/tiny", "--data", "text.txt", "--seq-len", "16"]) == 0
    assert main(["import-hf", "org/tiny", "run"]) == 0


@pytest.mark.slow
def test_run_starts_with_the_weights_of_the_name(tmp_path: Path) -> None:
    assert main(["import-hf", "org/tiny", "run"]) == 0
    Path("text.txt").write_text("AB " * 400)
    words = [
        "--mesh.data",
        "8",
        "--train.batch_size",
        "8",
        "--train.steps",
        "1",
        "--optimizer.warmup_steps",
        "0",
        "--data.source",
        "text",
    ]
    words += ["--data.paths", "text.txt", "--data.seq_len", "8", "--data.tokenizer"]
    losses = []
    for folder in ("plain", "org/tiny"):
        own = [folder, "--train.init_from", folder, "--run.folder", f"runs-of-{Path(folder).name}"]
        summary = train(load_config("run/config.toml", [*words, *own]))
        losses.append(summary.final_train_loss)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_adapters_on_the_weights_of_the_name_are_written_with_it() -> None:
    assert main(["import-hf", "plain", "base"]) == 0
    Path("text.txt").write_text("AB " * 400)
    words = ["--mesh.data", "8", "--train.batch_size", "8", "--train.steps", "2", "--optimizer.warmup_steps", "1"]
    words += ["--data.source", "text", "--data.paths", "text.txt", "--data.seq_len", "8", "--data.tokenizer", "plain"]
    words += ["--train.init_from", "org/tiny", "--model.lora_rank", "2", "--run.name", "tuned"]
    run = train(load_config("base/config.toml", words)).folder
    assert main(["export-hf", str(run), "adapters", "--adapters"]) == 0
    assert json.loads(Path("adapters/adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    merged, again = load_model(run), load_model("adapters")
    leaves = zip(jax.tree.leaves(nnx.state(merged)), jax.tree.leaves(nnx.state(again)), strict=True)
    assert all(np.array_equal(one, other) for one, other in leaves)
