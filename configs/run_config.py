"""A run as one typed value, read from a TOML file and the command line.

Sections are frozen pydantic models; `mesh` and `model` are the toolkit's own values. Nothing here starts a jax backend,
so fake devices can still be asked for afterwards. What needs two sections at once is in `check.py`; read that next.
"""

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
from .keys import draw_keys, list_keys
from .mistakes import Mistake, make_config_error
from .overrides import Override, read_overrides, split_words
from .pydantic_errors import list_mistakes
from .toml_file import ConfigFile, read_config_file
from .values import make_plain

_MOST = 2**31 - 1
"""Steps, tokens and ids are 32-bit numbers on a device."""


class Section(BaseModel):
    """What every section shares: no unknown keys, no silent conversions, no change after reading, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives and what it starts from."""

    name: str = Field(
        "run", pattern=r"^[^/\\]*[^/\\.][^/\\]*$", description="folder of this run; the file's name if left out"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the parameters and of the order of the data")
    folder: str = Field("runs", min_length=1, description="folder that holds all runs")
    fake_devices: int = Field(
        0, ge=0, le=MOST_FAKE_DEVICES, description="number of fake CPU devices; 0 takes the real ones"
    )
    silence_s: int = Field(30, ge=5, le=50, description="seconds without a word after which a process counts as lost")


class DataSection(Section):
    """The corpus and how it is cut."""

    source: Literal["stdlib", "text", "tokens"] = Field(
        "stdlib", description="Python's own sources, text files, or arrays of token ids"
    )
    paths: tuple[str, ...] = Field((), description="files or globs, for source text or tokens")
    tokenizer: str = Field(
        "bytes", min_length=1, description="text to tokens: bytes, or a tokenizer.json, or a folder that has one"
    )
    seq_len: int = Field(gt=0, le=_MOST, description="tokens of one sequence")
    val_fraction: float = Field(0.05, gt=0, lt=1, description="share of the corpus held out, from its tail")
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="integer type of raw .bin token files")


class TrainSection(Section):
    """How long to train and how often to look."""

    steps: int = Field(gt=0, le=_MOST, description="optimizer steps")
    batch_size: int = Field(gt=0, le=_MOST, description="sequences of one step, over all devices and microbatches")
    log_every: int = Field(10, gt=0, le=_MOST, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(0, ge=0, le=_MOST, description="steps between validations; 0 validates only at the end")
    eval_batches: int = Field(8, gt=0, le=_MOST, description="batches of one validation")
    init_from: str = Field(
        "", description="Hugging Face or run folder whose weights to begin with; drawn at random if left out"
    )
    bad_step: Literal["stop", "skip"] = Field("stop", description="what to do when a loss is not finite, or a spike")
    spike_ratio: float = Field(0.0, ge=0, description="loss over its running mean that is a spike, over 1; 0 is none")

    @field_validator("spike_ratio")
    @classmethod
    def _check_spike_ratio(cls, value: float) -> float:
        # Every loss but a falling one would be a spike, and the run would stop at its second step.
        if 0 < value <= 1:
            raise PydanticCustomError("spike_ratio", "expected more than 1, such as 2, or 0 for no spikes")
        return value


class OptimizerSection(Section):
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, le=_MOST, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; norms and biases have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="memory of the squared gradient")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the squared gradient")
    clip_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    zero: Literal["off", "on"] = Field("off", description="split the optimizer state over data (ZeRO-1)")


class PipelineSection(Section):
    """How a step is cut into microbatches and stages."""

    schedule: str = Field("1f1b", min_length=1, description="order of forwards and backwards, or a .csv of your own")
    chunks: int = Field(1, gt=0, le=_MOST, description="chunks of layers a rank, 2 or more for interleaved schedules")
    max_in_flight: int = Field(
        0, ge=0, le=_MOST, description="microbatches a rank may hold under schedule auto; 0 is no limit"
    )
    microbatches: int = Field(1, gt=0, le=_MOST, description="parts of a batch; gradient accumulation when pipe=1")
    remat: Literal["none", "full", "dots"] = Field("dots", description="what the backward recomputes")
    unroll: Literal["off", "on"] = Field("off", description="write the layers of a stage out: faster, compiles longer")
    layers_per_stage: Literal["auto"] | tuple[int, ...] = Field(
        "auto", description="layers of every stage, first to last, such as 3,3,2; auto balances their time"
    )
    vocab: Literal["split", "ends"] = Field(
        "split", description="embedding and head split over pipe x tensor, or whole on the end stages"
    )

    @field_validator("layers_per_stage", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        # pydantic alone would tell of one mistake twice, once for "auto" and once for the list.
        if isinstance(value, list | tuple) and all(type(count) is int for count in value):
            return tuple(value)
        if value != "auto":
            raise PydanticCustomError("auto_or_list", "expected 'auto' or a list of whole numbers")
        return value


class CheckpointSection(Section):
    """When to save, and what to keep."""

    every: int = Field(0, ge=0, le=_MOST, description="steps between saves; 0 saves only at the end")
    keep: int = Field(2, gt=0, le=_MOST, description="newest saves to keep")
    keep_every: int = Field(0, ge=0, le=_MOST, description="keep also the save of every so many steps; 0 keeps none")


class RunConfig(Section):
    """Everything that defines a run; `load_config` reads one from a file."""

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


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> RunConfig:
    """Return the run that a TOML file and command-line overrides describe.

    >>> load_config("quickstart", ["--train.steps", "50", "--mesh.data=4"]).train.steps
    50

    Args:
        path: a file, or the bare name of a config that comes with trellax.
        overrides: words as on the command line, `--section.key value` or `--section.key=value`, or all as one text.

    Raises:
        ConfigError: one line for every mistake, each with its file and line or its override.
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
    """Return the run that plain nested dicts describe, for scripts without a file.

    >>> values = {
    ...     "model": {"vocab_size": 256, "num_layers": 1, "hidden_size": 8, "num_heads": 1},
    ...     "data": {"seq_len": 16},
    ...     "train": {"steps": 1, "batch_size": 2},
    ...     "optimizer": {"learning_rate": 1e-3},
    ... }
    >>> config_from_dict(values).data.source
    'stdlib'

    Raises:
        ConfigError: one line for every mistake.
    """
    return _validate(values, file=None, overrides=(), mistakes=[])


def config_keys() -> list[str]:
    """Return every key a run file may hold, as `section.key`."""
    return [key.name for key in list_keys(RunConfig)]


def render_help() -> str:
    """Return the table of all keys with type, default and meaning, as `trellax train --help` prints it."""
    return draw_keys(list_keys(RunConfig), width=terminal_width())


def _validate(
    values: Mapping[str, Any], *, file: ConfigFile | None, overrides: Sequence[Override], mistakes: list[Mistake]
) -> RunConfig:
    # Only in its JSON mode is pydantic strict about numbers and yet fills our dataclasses from plain tables.
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
