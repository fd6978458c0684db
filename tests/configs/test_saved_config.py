"""The config of a save that another trellax wrote: one rule for all who read it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trellax.configs import RunConfig, config_from_dict
from trellax.configs.changes import list_changes
from trellax.configs.saved_config import read_saved_config
from trellax.hub.saves.seal import Seal
from trellax.layers import param_counts
from trellax.meshes import CheckpointError

Tiny = Callable[..., RunConfig]


def seal_of(config: RunConfig, **sections: dict[str, Any]) -> Seal:
    values = config.model_dump(mode="json")
    changed = {
        section: values.get(section, {}) | sections.get(section, {}) for section in values.keys() | sections.keys()
    }
    arrays = {"params.all": ("float32", (param_counts(config.model).total,), "0" * 16)}
    return Seal(step=40, saved_at="", config=changed, data={}, arrays=arrays, files={})


def read(seal: Seal, told: list[str]) -> dict[str, Any]:
    return read_saved_config(seal, folder=Path("run/checkpoints/40"), say=told.append)


def test_config_of_this_trellax_is_read_as_it_is(tiny: Tiny) -> None:
    told: list[str] = []
    assert read(seal_of(tiny()), told) == tiny().model_dump(mode="json")
    assert told == []


def test_keys_and_sections_that_are_newer_are_left_out_and_named(tiny: Tiny) -> None:
    told: list[str] = []
    seal = seal_of(tiny(), train={"new": 1}, later={"key": [1, {}]}, empty={}, mesh={"beam": 2})
    values = read(seal, told)
    assert config_from_dict(values) == tiny()
    assert list_changes(values, tiny()) == []
    (text,) = told
    assert text.startswith("run/checkpoints/40 was saved with ")
    assert all(name in text for name in ("train.new", "later.key", "empty", "mesh.beam"))
    assert text.endswith(", which this trellax does not know and leaves out")


def test_key_of_the_model_that_is_newer_is_refused(tiny: Tiny, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(seal_of(tiny(), model={"soft_cap": 30.0}), [])
    golden("errors/configs/checkpoint_newer_model.txt", str(caught.value))


def test_older_keys_have_their_defaults(tiny: Tiny) -> None:
    seal = seal_of(tiny())
    older = {section: keys for section, keys in seal.config.items() if section != "checkpoint"}
    assert config_from_dict(read(replace(seal, config=older), [])).checkpoint.keep == 2


def test_value_that_cannot_be_is_reported_with_the_save(tiny: Tiny) -> None:
    with pytest.raises(
        CheckpointError, match=r"^run/checkpoints/40 was saved with a config that .* cannot read: train"
    ):
        read(seal_of(tiny(), train={"steps": "many"}), [])


def test_config_of_another_model_than_the_arrays_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"the config of a model of [\d,]+ parameters, and holds [\d,]+\."):
        read(seal_of(tiny(), model={"num_layers": 9999}), [])


def test_control_characters_in_names_are_escaped(tiny: Tiny) -> None:
    told: list[str] = []
    read(seal_of(tiny(), train={"\x1b[31m" + "x" * 5000: 1}), told)
    assert told[0].isprintable()
    assert len(told[0]) < 300
