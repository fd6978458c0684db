"""The config of a run as one typed value, read from a TOML file and the command line.

Its sections are frozen pydantic models, except `mesh` and `model`, which are the dataclasses that the toolkit computes
with. Nothing here starts a jax backend, so that fake devices can still be asked for afterwards. Checks across sections
are in `check.py`; read that next.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ..layers import ModelConfig
from ..meshes import MeshSpec
from ..meshes.spec import MOST_FAKE_DEVICES
from ..meshes.terminal import terminal_width
from .keys import draw_keys, list_keys, render_keys
from .mistakes import Mistake, make_config_error
from .overrides import Override, read_overrides, split_words
from .pydantic_errors import list_mistakes
from .toml_file import ConfigFile, read_config_file
from .values import make_plain

_MAX = 2**31 - 1
"""Steps, tokens and ids are 32-bit integers on a device."""

_REFERENCE_HEAD = """# Config keys

All keys of a run file, by section. `required` marks keys without a default. On the command line a key is
`--section.key value`, for example `trellax train quickstart --train.steps 50`; a list is written with commas, or as
TOML has it.

This page is written by `trellax.configs.run_config.render_reference`; a test keeps the two equal.

"""


class Section(BaseModel):
    """A section of a run file: it takes no unknown key, converts no value, has no infinity, and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """The run folder, seed and devices of a run."""

    name: str = Field(
        "run",
        pattern=r"^[^/\\]*[^/\\.][^/\\]*$",
        description="name of this run's folder; the config file's if left out",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the parameters and the order of the data")
    folder: str = Field("runs", min_length=1, description="folder that holds all runs")
    fake_devices: int = Field(
        0, ge=0, le=MOST_FAKE_DEVICES, description="number of fake CPU devices; 0 uses the real devices"
    )
    silence_s: int = Field(
        30, ge=5, le=50, description="seconds without a heartbeat after which a process counts as lost"
    )


class DataSection(Section):
    """The corpus, its tokens, and its split into sequences and validation."""

    source: Literal["stdlib", "text", "tokens"] = Field(
        "stdlib", description="Python's standard library sources, text files, or arrays of token ids"
    )
    paths: tuple[str, ...] = Field((), description="files or globs, for the sources text and tokens")
    tokenizer: str = Field("bytes", min_length=1, description="bytes, a tokenizer.json, or a folder with one")
    seq_len: int = Field(gt=0, le=_MAX, description="tokens of a sequence")
    val_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the corpus held out for validation, from its end"
    )
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="integer type of .bin token files")


class TrainSection(Section):
    """Length of the training, logging and validation."""

    steps: int = Field(gt=0, le=_MAX, description="number of optimizer steps")
    batch_size: int = Field(gt=0, le=_MAX, description="sequences of a step, over all devices and microbatches")
    log_every: int = Field(10, gt=0, le=_MAX, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(0, ge=0, le=_MAX, description="steps between validations; 0 validates only at the end")
    eval_batches: int = Field(8, gt=0, le=_MAX, description="batches of a validation")
    init_from: str = Field(
        "", description="Hugging Face or run folder to take initial weights from; random if left out"
    )
    bad_step: Literal["stop", "skip"] = Field("stop", description="what to do when a loss is not finite, or spikes")
    spike_ratio: float = Field(
        0.0, ge=0, description="loss / its running mean from which a loss is a spike, over 1; 0 is never"
    )

    @field_validator("spike_ratio")
    @classmethod
    def _check_spike_ratio(cls, value: float) -> float:
        # At 1 every loss that does not fall is a spike, and a run stops at its second step.
        if 0 < value <= 1:
            raise PydanticCustomError("spike_ratio", "expected more than 1, such as 2, or 0 for no spikes")
        return value


class OptimizerSection(Section):
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, le=_MAX, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / peak")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices; norms and biases have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay rate of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm above which gradients are scaled down")
    zero: Literal["off", "on"] = Field("off", description="shard the optimizer state over data (ZeRO-1)")


class PipelineSection(Section):
    """The split of a step into microbatches and stages, and their schedule."""

    schedule: str = Field("1f1b", min_length=1, description="name of a schedule, or a .csv file of your own")
    chunks: int = Field(1, gt=0, le=_MAX, description="chunks of layers on a rank; 2 or more for interleaved schedules")
    max_in_flight: int = Field(
        0, ge=0, le=_MAX, description="most microbatches in flight on a rank, for the schedule auto; 0 is no limit"
    )
    microbatches: int = Field(1, gt=0, le=_MAX, description="microbatches of a step; gradient accumulation when pipe=1")
    remat: Literal["none", "full", "dots"] = Field(
        "dots", description="what the backward recomputes: little (none), all but matrix products (dots), or all"
    )
    unroll: Literal["off", "on"] = Field("off", description="unroll the layers of a stage: faster, but compiles longer")
    layers_per_stage: Literal["auto"] | tuple[int, ...] = Field(
        "auto", description="layers of each stage, first to last, such as 3,3,2; auto balances their times"
    )
    vocab: Literal["split", "ends"] = Field(
        "split", description="embedding and head split over pipe x tensor, or whole on the first and last stage"
    )

    @field_validator("layers_per_stage", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        # pydantic alone would report one mistake twice, for "auto" and for the list.
        if isinstance(value, list | tuple) and all(type(count) is int for count in value):
            return tuple(value)
        if value != "auto":
            raise PydanticCustomError("auto_or_list", "expected 'auto' or a list of whole numbers")
        return value


class CheckpointSection(Section):
    """How often to save, and which saves to keep."""

    every: int = Field(0, ge=0, le=_MAX, description="steps between saves; 0 saves only at the end")
    keep: int = Field(2, gt=0, le=_MAX, description="number of newest saves to keep")
    keep_every: int = Field(
        0, ge=0, le=_MAX, description="also keep the saves of multiples of so many steps; 0 keeps none"
    )


class RunConfig(Section):
    """The config of a run: everything that defines it. `load_config` reads one from a file."""

    run: RunSection = RunSection()
    mesh: MeshSpec = MeshSpec()
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    pipeline: PipelineSection = PipelineSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def run_folder(self) -> Path:
        """The folder that this run writes to."""
        return Path(self.run.folder) / self.run.name

    def _repr_html_(self) -> str:
        """Return the config as a table for notebooks: a row for each section, and in it what differs from defaults."""
        rows = []
        for section, values in self.model_dump(mode="json").items():
            text = ", ".join(f"{key}={value!r}" for key, value in values.items() if not self._is_default(section, key))
            rows.append(f"<tr><th>{section}</th><td><code>{html.escape(text)}</code></td></tr>")
        return f"<table>{''.join(rows)}</table>"

    def _is_default(self, section: str, key: str) -> bool:
        own = getattr(self, section)
        fields = type(own).model_fields if isinstance(own, BaseModel) else type(own).__dataclass_fields__
        return getattr(own, key) == fields[key].default


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> RunConfig:
    """Read the config of a run from a TOML file, with overrides from the command line.

    >>> load_config("quickstart", ["--train.steps", "50", "--mesh.data=4"]).train.steps
    50

    Args:
        path: a file, or the name of a config that comes with trellax, such as "quickstart".
        overrides: `--section.key value` or `--section.key=value`, as words or as one text.

    Raises:
        ConfigError: with a line for every mistake, each with its file and line or its override.
    """
    file = read_config_file(path)
    words = split_words(overrides) if isinstance(overrides, str) else overrides
    given, mistakes = read_overrides(words, keys=list_keys(RunConfig))
    values = {section: dict(v) if isinstance(v, Mapping) else v for section, v in file.values.items()}
    for override in given:
        section = values.setdefault(override.section, {})
        if isinstance(section, dict):
            section[override.key] = override.value
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", file.path.stem)
    return _validate(values, file=file, overrides=given, mistakes=mistakes)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return the config of a run given as nested dicts, for scripts without a file.

    >>> values = {
    ...     "model": {"vocab_size": 256, "num_layers": 1, "hidden_size": 8, "num_heads": 1},
    ...     "data": {"seq_len": 16},
    ...     "train": {"steps": 1, "batch_size": 2},
    ...     "optimizer": {"learning_rate": 1e-3},
    ... }
    >>> config_from_dict(values).data.source
    'stdlib'

    Raises:
        ConfigError: with a line for every mistake.
    """
    return _validate(values, file=None, overrides=(), mistakes=[])


def config_keys() -> list[str]:
    """Return every key that a run file may have, as `section.key`."""
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
    # pydantic fills dataclasses from plain tables, while it stays strict about numbers, only in its JSON mode.
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
