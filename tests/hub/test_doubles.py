"""Where two keys or files of a folder differ, the value counts that transformers takes, and a warning says so.

test_transformers.py compares with transformers itself.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from trellax.commands.cli import main
from trellax.hub.config import read_hub_model
from trellax.hub.read import open_weights, read_weights
from trellax.hub.tensor_files import INDEX, SINGLE
from trellax.meshes import WeightsError

from .hf_doubles import DOUBLES, HEAD, make, merge
from .hf_doubles import say as say_again
from .hub import GOLDEN, shapes_of


def test_setting_given_by_two_keys_is_used_once_with_a_warning(
    tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    lines = []
    for name, double in DOUBLES.items():
        twice = make(double, tmp_path / name / "twice", how=double.twice)
        once = make(double, tmp_path / name / "once", how=double.once)
        said: list[str] = []
        found = read_weights(twice, shapes_of(twice), say=said.append)
        expected = read_weights(once, shapes_of(once))
        assert read_hub_model(twice).config == read_hub_model(once).config, name
        assert jax.tree.structure(found) == jax.tree.structure(expected), name
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), name
        lines += [f"{name}:", *(f"  {line.partition(': ')[2]}" for line in said or [": nothing"])]
    golden("hf_doubles.txt", "\n".join(lines))


def test_names_in_a_warning_are_escaped(tmp_path: Path) -> None:
    folder = make(DOUBLES["a stale index"], tmp_path / "model", how=say_again(rope_scaling={"\x1b[2J": 1}))
    said: list[str] = []
    read_weights(folder, shapes_of(folder), say=said.append)
    assert said
    assert all(line.isprintable() for line in said)


def test_a_trained_head_survives_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double = DOUBLES["llama32, others head"]
    folder = make(double, tmp_path / "model", how=double.twice)
    assert main(["import-hf", str(folder), str(tmp_path / "run")]) == 0
    assert "tie_word_embeddings is true" in capsys.readouterr().err
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert np.array_equal(load_file(tmp_path / "back" / SINGLE)[HEAD], load_file(folder / SINGLE)[HEAD])
    assert read_hub_model(tmp_path / "back").config.embeddings == "untied"


def test_parameters_without_a_head_are_not_read_from_a_folder_with_one(tmp_path: Path) -> None:
    double = DOUBLES["llama32, others head"]
    folder = make(double, tmp_path / "model", how=double.twice)
    with pytest.raises(WeightsError, match=r"lm_head\.weight is a table of its own"):
        open_weights(folder, shapes_of(GOLDEN / "llama32"))


def test_a_head_of_another_shape_is_reported(tmp_path: Path) -> None:
    folder = make(DOUBLES["gpt2, same head"], tmp_path / "model", how=lambda _: None)
    merge(folder, lambda tensors: tensors.update({HEAD: np.zeros((1, 2), np.float32)}))
    with pytest.raises(WeightsError, match=r"lm_head\.weight is \[1, 2\], not \[64, 16\]"):
        open_weights(folder, shapes_of(folder))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."])
def test_an_index_names_files_of_its_folder_alone(file: str, tmp_path: Path) -> None:
    folder = make(DOUBLES["a stale index"], tmp_path / "model", how=lambda _: None)
    shapes = shapes_of(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("model-00002-of-00002.safetensors", file))
    with pytest.raises(WeightsError, match="which is no name of a file in this folder"):
        open_weights(folder, shapes)
