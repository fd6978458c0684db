"""Only regular files of bounded size inside a model's folder are read; a Hugging Face cache may link to its blobs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.hub.config import read_hub_model
from trellax.hub.folder import copy_file, find_file, read_file, read_json
from trellax.meshes import DataError, WeightsError

from .hub import GOLDEN

NAME = "config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, beside a file that is none of its business."""
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a named pipe": (os.mkfifo, "is a named pipe, where a file should be"),
    "a folder": (Path.mkdir, "is a folder, where a file should be"),
    "a link out of the folder": (lambda path: path.symlink_to("../secret"), "which is no file of this folder"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "which is no file of this folder"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to a file that is not there"),
    "a link in a circle": (lambda path: path.symlink_to(NAME), "its links lead in a circle"),
    "a sparse file": (_sparse, "such a file has at most"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a pointer of git lfs, not the file itself",
    ),
    "deep": (lambda path: path.write_text("[" * 200_000), "cannot be read"),
    "a byte-order mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "this is no JSON"),
    "UTF-16": (lambda path: path.write_bytes("{}".encode("utf-16")), "it is no UTF-8 text"),
    "a long number": (lambda path: path.write_text("9" * 5_000), "cannot be read"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("error", [WeightsError, DataError])
def test_odd_file_is_one_sentence(name: str, error: type[WeightsError], folder: Path) -> None:
    make, why = ODD[name]
    make(folder / NAME)
    with pytest.raises(error, match=why):
        read_json(folder, NAME, error=error)


def test_name_that_no_file_can_have_is_not_there(folder: Path) -> None:
    for name in ("\ud800", "a\0b"):
        assert read_json(folder, name) is None


def test_links_within_a_folder_and_to_blobs_of_its_cache_are_read(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot, blobs = cache / "snapshots" / "0a1b", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "77").write_text('{"a": 1}')
    (snapshot / NAME).symlink_to("../../blobs/77")
    (snapshot / "other.json").symlink_to(NAME)
    assert read_json(snapshot, NAME) == read_json(snapshot, "other.json") == {"a": 1}
    (tmp_path / "alias").symlink_to(snapshot)
    assert read_json(tmp_path / "alias", NAME) == {"a": 1}
    # Neither a cache of another model nor what its blobs lead to.
    (tmp_path / "models--org--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--org--other" / "blobs" / "77").write_text("{}")
    (snapshot / "far.json").symlink_to("../../../models--org--other/blobs/77")
    (blobs / "78").symlink_to("/etc/hostname")
    (snapshot / "out.json").symlink_to("../../blobs/78")
    for name in ("far.json", "out.json"):
        with pytest.raises(WeightsError, match="which is no file of this folder"):
            find_file(snapshot, name)


def test_file_that_is_not_there_is_none_and_one_that_is_too_large_is_reported(folder: Path) -> None:
    assert find_file(folder, NAME) is None
    assert read_json(folder, NAME) is None
    (folder / NAME).write_text("12345")
    assert read_file(folder, NAME, max_bytes=5) == b"12345"
    with pytest.raises(WeightsError, match="has at most 4"):
        read_file(folder, NAME, max_bytes=4)


def test_a_copy_replaces_a_link_and_not_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    (folder / NAME).write_text("new")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "secret")
    copy_file(folder, NAME, tmp_path / "run" / NAME)
    assert (tmp_path / "run" / NAME).read_text() == "new"
    assert (tmp_path / "secret").read_text() == "{}"


def test_nothing_from_outside_is_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (GOLDEN / "llama3").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secret").write_text("key")
    (model / "tokenizer.model").symlink_to("../secret")
    assert main(["import-hf", str(model), str(tmp_path / "run")]) == 2
    assert "tokenizer.model is a link to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gpt_oss", "smollm3", "mixtral", "llama4", "qwen3_moe"])
def test_unknown_architecture_is_not_taken_for_a_similar_name(kind: str, folder: Path) -> None:
    (folder / NAME).write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(WeightsError) as caught:
        read_hub_model(folder)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("number", ["1000000000", str(2**70), "1e9", "true", "0", "-1", '"2"', "1e999", "NaN"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "head_dim", "sliding_window", "rms_norm_eps"])
def test_numbers_are_such_as_models_have(key: str, number: str, folder: Path) -> None:
    text = (GOLDEN / "qwen3" / NAME).read_text()
    (folder / NAME).write_text(text.rstrip().removesuffix("}") + f', "{key}": {number}}}')
    if key == "sliding_window" and number in ("0", "1000000000"):
        assert read_hub_model(folder).config.attention_window == 0  # use_sliding_window is false
        return
    if key == "rms_norm_eps" and number in ("1e9", "1000000000", str(2**70)):
        assert read_hub_model(folder).config.norm_epsilon == float(number)
        return
    with pytest.raises(WeightsError, match=f"{key}=.* is no "):
        read_hub_model(folder)
