"""Load the config of a run from a TOML file and the command line as one typed value, `RunConfig`.

Nothing here starts a jax backend, so `use_fake_devices` can still be called afterwards. Read `sections.py` next for the
keys, then `check.py` for the checks across sections.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..layers import ModelConfig
from ..meshes import MeshSpec
from ..meshes.notebook import table_html
from ..meshes.spec import SequenceParallel
from ..meshes.terminal import terminal_width
from .keys import draw_keys, list_keys, own_mesh_keys, render_keys
from .mesh_section import MeshSection, own_axes
from .mistakes import Mistake, make_config_error
from .overrides import Override, read_overrides, split_words
from .pydantic_errors import list_mistakes
from .sections import (
    CheckpointSection,
    DataSection,
    OptimizerSection,
    PipelineSection,
    RunSection,
    Section,
    TrainSection,
)
from .toml_file import ConfigFile, read_config_file
from .values import make_plain

_REFERENCE_HEAD = """# Config keys

All keys of a run file, by section. `required` marks keys without a default. On the command line a key is
`--section.key value`, for example `trellax train quickstart --train.steps 50`; a list is written with commas, or as
TOML has it.

This page is written by `trellax.configs.run_config.render_reference`; a test keeps the two equal.

"""


class RunConfig(Section):
    """The config of a run, frozen and validated section by section. `load_config` reads one from a file."""

    run: RunSection = RunSection()
    mesh: MeshSection = MeshSpec()
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    pipeline: PipelineSection = PipelineSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def run_folder(self) -> Path:
        """The folder that the run writes to, `run.folder/run.name`."""
        return Path(self.run.folder) / self.run.name

    @property
    def sequence(self) -> SequenceParallel:
        """`mesh.sequence`; auto is off with a block, feed-forward or attention of the user's, which sees all tokens."""
        is_own = self.model.block or self.model.mlp_class or self.model.attention_class
        return "off" if is_own and self.mesh.sequence == "auto" else self.mesh.sequence

    def _repr_html_(self) -> str:
        """Return an HTML table for notebooks: a row for each section, with the values that are not defaults."""
        rows = [("section", "values that are not defaults")]
        for section, values in self.model_dump(mode="json").items():
            given = {key: value for key, value in values.items() if not self._is_default(section, key)}
            rows.append((section, ", ".join(f"{key}={value!r}" for key, value in given.items())))
        return table_html(rows, left=2)

    def _is_default(self, section: str, key: str) -> bool:
        own = getattr(self, section)
        if isinstance(own, MeshSpec):
            return (key == "sequence" and own.sequence == "auto") or own.sizes.get(key, 1) == 1
        fields = type(own).model_fields if isinstance(own, BaseModel) else type(own).__dataclass_fields__
        return getattr(own, key) == fields[key].default


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> RunConfig:
    """Load the config of a run from a TOML file, with overrides from the command line.

    >>> load_config("quickstart", ["--train.steps", "50", "--mesh.data=4"]).train.steps
    50

    Args:
        path: a TOML file, or the name of a packaged config such as "quickstart".
        overrides: `--section.key value` or `--section.key=value`, as a list of words or as one text.

    Raises:
        ConfigError: the file cannot be read, or has mistakes; each is listed with its line or its override.
    """
    file = read_config_file(path)
    words = split_words(overrides) if isinstance(overrides, str) else overrides
    own_keys = own_mesh_keys(own_axes(file.values.get("mesh"), words))
    given, mistakes = read_overrides(words, keys=[*list_keys(RunConfig), *own_keys])
    values = {section: dict(v) if isinstance(v, Mapping) else v for section, v in file.values.items()}
    for override in given:
        set_value(values, override)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", file.path.stem)
    return _validate(values, file=file, overrides=given, mistakes=mistakes)


def set_value(values: dict[str, Any], override: Override) -> None:
    """Set the value of an override in nested dicts of sections; `mesh.roles.dp` is nested once more."""
    *tables, key = override.section, *override.key.split(".")
    section: Any = values
    for name in tables:
        inner = section.get(name, {})
        if not isinstance(inner, Mapping):
            return
        section[name] = section = dict(inner)
    section[key] = override.value


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate nested dicts as the config of a run, for scripts without a file.

    >>> values = {
    ...     "model": {"vocab_size": 256, "num_layers": 1, "hidden_size": 8, "num_heads": 1},
    ...     "data": {"seq_len": 16},
    ...     "train": {"steps": 1, "batch_size": 2},
    ...     "optimizer": {"learning_rate": 1e-3},
    ... }
    >>> config_from_dict(values).data.source
    'stdlib'

    Raises:
        ConfigError: there are mistakes, which are all listed.
    """
    return _validate(values, file=None, overrides=(), mistakes=[])


def config_keys() -> list[str]:
    """Return all keys of a run config, as `section.key`."""
    return [key.name for key in list_keys(RunConfig)]


def render_help() -> str:
    """Return the table of all keys with type, default and meaning, as `trellax train --help` prints it."""
    return draw_keys(list_keys(RunConfig), width=terminal_width())


def render_reference() -> str:
    """Return docs/reference/config.md: all keys with type, default and meaning, as Markdown."""
    return _REFERENCE_HEAD + render_keys(list_keys(RunConfig))


def _validate(
    values: Mapping[str, Any], *, file: ConfigFile | None, overrides: Sequence[Override], mistakes: list[Mistake]
) -> RunConfig:
    # Only from JSON does pydantic build dataclasses from dicts and stay strict about numbers.
    plain, unrepresentable = make_plain(values)
    try:
        config = RunConfig.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        found = list_mistakes(
            error.errors(include_url=False),
            unrepresentable=unrepresentable,
            file=file,
            overrides=overrides,
            keys=list_keys(RunConfig),
        )
        raise make_config_error([*found, *mistakes]) from None
    if mistakes:
        raise make_config_error(mistakes)
    return config
