"""The section [mesh] takes axes with names of one's own and their roles, and default names as ever."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trellax.configs.changes import list_changes
from trellax.configs.check import check_run
from trellax.configs.mesh_section import write_mesh
from trellax.configs.resolved_config import list_hyperparameters, write_resolved_config
from trellax.configs.run_config import RunConfig, config_from_dict, load_config
from trellax.configs.saved_config import read_saved_config
from trellax.configs.write_plan import write_plan
from trellax.hub.saves.seal import Seal
from trellax.layers import param_counts
from trellax.meshes import ConfigError, MeshSpec
from trellax.plan import Layout

REST = """
[model]
vocab_size = 256
num_layers = 4
hidden_size = 32
num_heads = 4

[data]
seq_len = 32

[train]
steps = 20
batch_size = 8

[optimizer]
learning_rate = 1e-2
"""
OWN = """
[mesh]
dp = 2
tp = 2
pp = 2

[mesh.roles]
dp = "batch"
tp = "tensor"
pp = "pipe"
"""
SPEC = MeshSpec.parse("dp=2:batch,tp=2:tensor,pp=2:pipe")

MISTAKES = {
    "unknown_role": OWN.replace('"batch"', '"bacth"'),
    "two_pipes": OWN.replace('"batch"', '"pipe"'),
    "size_without_a_role": OWN.replace('tp = "tensor"\n', ""),
    "default_name_of_another_role": OWN + 'tensor = "batch"\n',
    "no_size": OWN.replace("dp = 2", "dp = 0"),
    "size_in_words": OWN.replace("dp = 2", 'dp = "two"'),
    "roles_are_no_table": '[mesh]\nroles = "batch"\n',
    "no_roles": "[mesh]\ndp = 2\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(mesh: str, *words: str) -> RunConfig:
    Path("run.toml").write_text(mesh + REST, encoding="utf-8")
    return load_config("run.toml", words)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_the_mesh_is_reported_with_its_line(
    name: str, folder: Path, golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(MISTAKES[name])
    golden(f"errors/configs/mesh_section_{name}.txt", str(caught.value))


def test_own_names_are_read_with_their_roles(folder: Path) -> None:
    assert load(OWN).mesh == SPEC


def test_default_names_stand_beside_own_ones(folder: Path) -> None:
    own = load('[mesh]\nreplica = 2\ndata = 3\n[mesh.roles]\nreplica = "batch"\n').mesh
    assert own == MeshSpec.parse("replica=2:batch,data=3")


def test_axis_with_a_role_and_no_size_has_one_device(folder: Path) -> None:
    assert load(OWN.replace("pp = 2\n", "", 1)).mesh == SPEC.resize(pp=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mesh.dp", "4"], SPEC.resize(dp=4)),
        (["--mesh.dp=4", "--mesh.pp=-1"], SPEC.resize(dp=4, pp=-1)),
        (["--mesh.roles.pp", "pipe"], SPEC),
    ],
)
def test_own_names_can_be_set_on_the_command_line(words: list[str], expected: MeshSpec, folder: Path) -> None:
    assert load(OWN, *words).mesh == expected


def test_axis_can_be_added_on_the_command_line(folder: Path) -> None:
    mesh = load("[mesh]\ndata = 2\n", "--mesh.roles.replica", "batch", "--mesh.replica", "4").mesh
    assert mesh == MeshSpec.parse("data=2,replica=4:batch")


def test_file_is_not_changed_by_overrides(folder: Path) -> None:
    load(OWN, "--mesh.dp", "4", "--mesh.roles.dp", "batch")
    assert load(OWN).mesh == SPEC


@pytest.mark.parametrize("mesh", ["", "[mesh]\ndata = 2\n", OWN])
def test_config_is_read_back_from_its_values(mesh: str, folder: Path) -> None:
    config = load(mesh)
    values = config.model_dump(mode="json")
    assert values["mesh"] == write_mesh(config.mesh)
    assert config_from_dict(values) == config


def test_default_names_are_written_without_roles(folder: Path) -> None:
    assert load("[mesh]\ndata = 2\n").model_dump(mode="json")["mesh"] == {
        "data": 2,
        "tensor": 1,
        "pipe": 1,
        "sequence": "auto",
    }


def test_resolved_config_holds_names_and_roles(folder: Path) -> None:
    config = load(OWN, "--run.folder", str(folder))
    config.run_folder.mkdir()
    path = write_resolved_config(config, say=pytest.fail)
    assert tomllib.loads(path.read_text())["mesh"] == tomllib.loads(OWN)["mesh"] | {"sequence": "auto"}
    assert load_config(path) == config


def test_hyperparameters_are_numbers_and_texts(folder: Path) -> None:
    shown = list_hyperparameters(load(OWN))
    assert (shown["mesh.dp"], shown["mesh.roles"]) == (2, "dp=batch,tp=tensor,pp=pipe")


def test_saved_config_keeps_own_names(folder: Path) -> None:
    config = load(OWN)
    arrays = {"params.all": ("float32", (param_counts(config.model).total,), "0" * 16)}
    seal = Seal(step=4, saved_at="", config=config.model_dump(mode="json"), data={}, arrays=arrays, files={})
    values: dict[str, Any] = read_saved_config(seal, folder=folder, say=pytest.fail)
    assert config_from_dict(values) == config


def test_names_of_axes_may_change_when_a_run_goes_on(folder: Path) -> None:
    assert list_changes(load(OWN).model_dump(mode="json"), load("[mesh]\ndata = 8\n")) == []
    assert list_changes(load("[mesh]\ndata = 8\n").model_dump(mode="json"), load(OWN)) == []


def test_sizes_that_do_not_divide_are_named_as_the_file_names_them(folder: Path) -> None:
    config = load(OWN.replace("tp = 2", "tp = 3").replace("dp = 2", "dp = 4"))
    with pytest.raises(ConfigError, match=r"mesh\.tp=3") as caught:
        check_run(config, num_devices=24)
    assert "mesh.tensor" not in str(caught.value)


def test_plan_is_written_by_the_names_of_the_file(folder: Path) -> None:
    load(OWN)
    text = write_plan("run.toml", Layout(data=4, tensor=1, pipe=2, microbatches=2, sequences=1), header=["planned"])
    values = tomllib.loads(text)
    assert values["mesh"] == {"dp": 4, "tp": 1, "pp": 2, "roles": {"dp": "batch", "tp": "tensor", "pp": "pipe"}}


def test_plan_gives_the_first_of_two_axes_of_a_role_all_its_devices(folder: Path) -> None:
    load('[mesh]\nreplica = 2\ndata = 2\n[mesh.roles]\nreplica = "batch"\n')
    text = write_plan("run.toml", Layout(data=4, tensor=1, pipe=2, microbatches=2, sequences=1), header=["planned"])
    sizes = tomllib.loads(text)["mesh"]
    assert (sizes["replica"], sizes["data"], sizes["pipe"]) == (4, 1, 2)


EXPERTS = REST.replace("[data]", "num_experts = 8\nexperts_per_token = 2\nbias = 'off'\n\n[data]")


@pytest.mark.parametrize(
    ("mesh", "overrides", "sizes"),
    [
        ('[mesh]\nep = 2\ncp = 4\n[mesh.roles]\nep = "expert"\ncp = "context"\n', (), {"ep": 4, "cp": 2}),
        ('[mesh]\ndp = 2\n[mesh.roles]\ndp = "batch"\n', (), {"dp": 1, "expert": 4, "context": 2}),
        ("[mesh]\nexpert = 8\n", (), {"data": 1, "expert": 4, "context": 2}),
        ("[mesh]\ndata = 8\n", ("--mesh.expert", "2"), {"data": 1, "expert": 4, "context": 2}),
    ],
)
def test_plan_writes_experts_and_context_by_the_names_of_the_file(
    folder: Path, mesh: str, overrides: tuple[str, ...], sizes: dict[str, int]
) -> None:
    Path("run.toml").write_text(mesh + EXPERTS)
    layout = Layout(data=4, expert=4, context=2, microbatches=1, sequences=1)
    Path("planned.toml").write_text(write_plan("run.toml", layout, header=["planned"], overrides=overrides))
    found = load_config("planned.toml").mesh
    assert {name: size for name, size in found.sizes.items() if size > 1 or name in sizes} == sizes
    assert found.num_devices == layout.num_devices


def test_plan_writes_experts_over_context_ranks(folder: Path) -> None:
    Path("run.toml").write_text("[mesh]\ndata = 8\n" + EXPERTS)
    layout = Layout(data=2, context=4, expert=4, context_expert=2, microbatches=1, sequences=1)
    Path("planned.toml").write_text(write_plan("run.toml", layout, header=["planned"]))
    found = load_config("planned.toml").mesh
    assert found.sizes == {"data": 1, "expert": 2, "context": 2, "context_expert": 2, "tensor": 1, "pipe": 1}
    assert (found.data, found.context, found.expert) == (layout.data, layout.context, layout.expert)


def test_plan_without_experts_and_context_takes_them_from_the_file(folder: Path) -> None:
    Path("run.toml").write_text("[mesh]\nexpert = 4\ncontext = 2\n" + EXPERTS)
    text = write_plan("run.toml", Layout(data=8, microbatches=1, sequences=1), header=["planned"])
    assert tomllib.loads(text)["mesh"] == {"data": 8, "tensor": 1, "pipe": 1, "expert": 1, "context": 1}


def test_plan_writes_over_what_the_old_mesh_alone_allowed(folder: Path) -> None:
    Path("run.toml").write_text("[pipeline]\ncontext_attention = 'ulysses'\n" + EXPERTS)
    layout = Layout(data=8, microbatches=1, sequences=1)
    words = ("--train.offload", "residuals", "--pipeline.context_attention", "ulysses")
    values = tomllib.loads(write_plan("run.toml", layout, header=["planned"], overrides=words))
    assert values["train"]["offload"] == "none"
    assert values["pipeline"]["context_attention"] == "auto"


def test_notebook_shows_own_axes(folder: Path) -> None:
    assert "dp=2" in load(OWN)._repr_html_()
