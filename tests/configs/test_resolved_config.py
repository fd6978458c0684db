"""A run folder holds the config it ran with, every key of it, and the file runs again."""

import io
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from trellax.configs import RunConfig, load_config
from trellax.configs.resolved_config import (
    is_resolved_config,
    list_hyperparameters,
    resolve_config,
    write_resolved_config,
)
from trellax.configs.run_config import config_keys
from trellax.meshes import mesh_sizes
from trellax.train import prepare, train

Tiny = Callable[..., RunConfig]


def resolved(config: RunConfig) -> RunConfig:
    return resolve_config(config, sizes=mesh_sizes(prepare(config).mesh))


def make_folder(config: RunConfig) -> Path:
    config.run_folder.mkdir(parents=True)
    return config.run_folder


def test_every_key_is_in_the_file_and_read_back_as_it_was(tiny: Tiny) -> None:
    config = resolved(tiny("--mesh.data -1 --train.spike_ratio 1.5 --run.seed 7 --pipeline.layers_per_stage auto"))
    make_folder(config)
    path = write_resolved_config(config, say=pytest.fail)
    values = tomllib.loads(path.read_text())
    assert [f"{section}.{key}" for section, keys in values.items() for key in keys] == [
        # An axis that a mesh may lack is written where it has one.
        name
        for name in config_keys()
        if name not in ("mesh.expert", "mesh.context", "mesh.context_expert")
    ]
    assert load_config(path) == config
    # The sizes are those of the mesh, where the config asked for the rest of the devices.
    assert values["mesh"] == {"data": 8, "tensor": 1, "pipe": 1, "sequence": "auto"}


@pytest.mark.parametrize("name", ["a b", 'quote"', "line\nbreak", "back\x7fspace", "é", "[brackets]"])
def test_odd_names_are_written_as_toml(name: str, tiny: Tiny) -> None:
    config = tiny("--mesh.data 8")
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    make_folder(config)
    assert load_config(write_resolved_config(config, say=pytest.fail)).run.name == name


def test_run_folder_is_trained_on_from_its_own_config(tiny: Tiny) -> None:
    config, quiet = tiny("--mesh.data -1 --train.steps 2 --run.name again"), Console(file=io.StringIO())
    first = train(config, console=quiet)
    path = config.run_folder / "config.toml"
    before, talk = path.read_text(), io.StringIO()
    # As `trellax train runs/again/config.toml` does.
    assert train(load_config(path), console=Console(file=talk)) == first
    assert "resumed   at step 2" in talk.getvalue()
    assert path.read_text() == before


def test_file_that_no_run_wrote_is_renamed(tiny: Tiny, tmp_path: Path) -> None:
    config, said = tiny("--mesh.data 8"), list[str]()
    folder = make_folder(config)
    (folder / "config.toml").write_text("# mine\n")
    for _ in range(2):
        write_resolved_config(config, say=said.append)
    assert (folder / "config.given.toml").read_text() == "# mine\n"
    assert is_resolved_config(folder / "config.toml")
    assert len(said) == 1
    # A link is renamed itself, and what it leads to is not touched.
    (tmp_path / "outside.toml").write_text("# theirs\n")
    (folder / "config.toml").unlink()
    (folder / "config.toml").symlink_to(tmp_path / "outside.toml")
    write_resolved_config(config, say=said.append)
    assert (tmp_path / "outside.toml").read_text() == "# theirs\n"
    assert is_resolved_config(folder / "config.toml")


def test_hyperparameters_are_plain_values_of_what_is_learnt(tiny: Tiny) -> None:
    shown = list_hyperparameters(tiny("--mesh.data 8 --run.seed 3 --optimizer.learning_rate 0.5"))
    assert (shown["run.seed"], shown["optimizer.learning_rate"], shown["mesh.data"]) == (3, 0.5, 8)
    assert {type(value) for value in shown.values()} <= {int, float, str}
    assert not {"run.name", "checkpoint.every"} & shown.keys()
