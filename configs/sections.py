"""Define the sections of a run config as frozen pydantic models: each key with type, bounds, default and meaning.

The sections [mesh] and [model] are `MeshSpec` and `ModelConfig`, the dataclasses that the toolkit itself uses.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from ..meshes.spec import MOST_FAKE_DEVICES, Offload, Shard

_MAX = 2**31 - 1
"""Largest count: steps, tokens and ids are int32 on a device."""


TrackerName = Literal["wandb", "mlflow"]
"""Trackers of experiments that a run can log to, each an extra of the package."""


class Section(BaseModel):
    """A section of a run config: frozen, without unknown keys, type conversions, NaN or infinity."""

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

    source: Literal["stdlib", "text", "chat", "tokens", "pairs"] = Field(
        "stdlib",
        description="Python's standard library sources, files of text or records, records of chats whose answers are "
        "trained on, arrays of token ids, or records of prompt, chosen and rejected (DPO)",
    )
    paths: tuple[str, ...] = Field((), description="files or globs, for all sources but stdlib")
    weights: tuple[float, ...] = Field(
        (),
        description="blend: a weight of each path, its share of the sequences; empty joins all paths into one corpus",
    )
    text_field: str = Field(
        "text",
        min_length=1,
        description="field of a record that holds its text, in .jsonl, .parquet and .arrow files; messages for chat",
    )
    tokenizer: str = Field("bytes", min_length=1, description="bytes, a tokenizer.json, or a folder with one")
    seq_len: int = Field(gt=0, le=_MAX, description="tokens of a sequence")
    val_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the corpus held out for validation, from its end"
    )
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="integer type of .bin token files")
    packing: Literal["off", "on"] = Field(
        "off", description="whether attention, positions and loss stop at the ends of the documents of a sequence"
    )
    end_id: int = Field(-1, ge=-1, le=_MAX, description="id of the token that ends a document; -1 is the tokenizer's")
    shuffle: Literal["sequences", "documents"] = Field(
        "sequences", description="what is shuffled: sequences alone, or documents first, before sequences are cut"
    )

    validation: tuple[str, ...] = Field(
        (), description="further validation sets, name=path each, such as wiki=wiki/*.jsonl; a name may have several"
    )

    @field_validator("validation")
    @classmethod
    def _check_validation(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, _, path = entry.partition("=")
            if not (re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and path.strip()):
                raise PydanticCustomError("validation", "expected name=path, such as wiki=wiki.jsonl")
        return value

    @property
    def validation_paths(self) -> dict[str, tuple[str, ...]]:
        """The paths of each further validation set, by its name."""
        pairs = [entry.partition("=")[::2] for entry in self.validation]
        return {name: tuple(path for own, path in pairs if own == name) for name, _ in pairs}

    @property
    def record_field(self) -> str:
        """The field of a record that is read; chats have another default than texts."""
        return "messages" if self.source == "chat" and self.text_field == "text" else self.text_field

    @property
    def needs_documents(self) -> str:
        """The key and value that take the ends of documents, "" if none does."""
        if self.packing == "on":
            return "data.packing='on'"
        return "data.shuffle='documents'" if self.shuffle == "documents" else ""


class TrainSection(Section):
    """Length of the training, logging and validation."""

    steps: int = Field(gt=0, le=_MAX, description="number of optimizer steps")
    seconds: int = Field(
        0, ge=0, le=_MAX, description="seconds after which a command saves, validates and ends; 0 is no limit"
    )
    batch_size: int = Field(gt=0, le=_MAX, description="sequences of a step, over all devices and microbatches")
    log_every: int = Field(10, gt=0, le=_MAX, description="steps between lines of metrics.jsonl")
    log_to: tuple[TrackerName, ...] = Field(
        (), description="trackers that get the lines of metrics.jsonl too: wandb, mlflow, or both"
    )
    eval_every: int = Field(0, ge=0, le=_MAX, description="steps between validations; 0 validates only at the end")
    eval_batches: int = Field(8, gt=0, le=_MAX, description="batches of a validation")
    patience: int = Field(
        0, ge=0, le=_MAX, description="validations in a row without a lower loss after which the run ends; 0 is no end"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay a step of an average of the weights, kept beside them; 0 keeps none"
    )
    z_loss: float = Field(
        0.0, ge=0, description="c of c (log Z)^2, added to each token's loss to keep logits small, such as 1e-4"
    )
    noise_scale: Literal["off", "on"] = Field(
        "off", description="log the gradient noise scale, in sequences; needs two data shards or more"
    )
    init_from: str = Field(
        "",
        description="Hugging Face or run folder, or org/name in the cache, with initial weights; random if left out",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="with data.source pairs: how strongly the model is kept near its initial weights"
    )
    shard: Shard = Field(
        "none",
        description="what data shards split: none, the optimizer (ZeRO-1), or weights too, gathered once a step, for "
        "each run of a chunk, or by each layer",
    )
    offload: Offload = Field(
        "none",
        description="what is kept in the memory of the host: nothing, the moments of the optimizer, or residuals of a "
        "pipeline",
    )
    bad_step: Literal["stop", "skip"] = Field("stop", description="what to do when a loss is not finite, or spikes")
    spike_ratio: float = Field(
        0.0, ge=0, description="loss / its running mean from which a loss is a spike, over 1; 0 is never"
    )

    @field_validator("spike_ratio")
    @classmethod
    def _check_spike_ratio(cls, value: float) -> float:
        # At 1, every loss above the mean would be a spike, and most runs would stop at their second step.
        if 0 < value <= 1:
            raise PydanticCustomError("spike_ratio", "expected more than 1, such as 2, or 0 for no spikes")
        return value


OwnSchedule = Literal["cosine", "linear", "constant", "wsd"]
"""Schedules of the learning rate by name: it falls all the way, stays, or stays and falls at the end (wsd)."""


class OptimizerSection(Section):
    """AdamW or Muon, and the learning rate over the steps."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="AdamW, or Muon for the kernels of layers with AdamW for all other parameters"
    )
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, le=_MAX, description="steps of linear warm-up")
    lr_schedule: str = Field(
        "cosine",
        min_length=1,
        description="after the warm-up: cosine, linear, constant, wsd, or a call of one of optax's with its arguments",
    )
    decay_steps: int = Field(
        0, ge=0, le=_MAX, description="last steps, in which wsd falls linearly; 0 is a tenth of train.steps"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / peak")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices; norms and biases have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay rate of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm above which gradients are scaled down")


class PipelineSection(Section):
    """The split of a step into microbatches and stages, and their schedule."""

    schedule: str = Field("1f1b", min_length=1, description="name of a schedule, or a .csv file of your own")
    chunks: int = Field(
        1, gt=0, le=_MAX, description="chunks of layers on a rank: 2 or more if interleaved, 2 in a V-shaped schedule"
    )
    max_in_flight: int = Field(
        0, ge=0, le=_MAX, description="most microbatches in flight on a rank, for the schedule auto; 0 is no limit"
    )
    microbatches: int = Field(1, gt=0, le=_MAX, description="microbatches of a step; gradient accumulation when pipe=1")
    remat: Literal["none", "full", "dots"] = Field(
        "dots", description="what the backward recomputes: little (none), all but matrix products (dots), or all"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="messages beside products in the steady state; auto turns it on for GPUs"
    )
    unroll: Literal["off", "on"] = Field("off", description="unroll the layers of a stage: faster, but compiles longer")
    layers_per_stage: Literal["auto"] | tuple[int, ...] = Field(
        "auto", description="layers of each stage, first to last, such as 3,3,2; auto balances their times"
    )
    context_attention: Literal["auto", "gather", "gather-once", "ulysses"] = Field(
        "auto",
        description="with mesh.context: gather keys and values, also again in the backward or once and keep them, or "
        "exchange tokens for heads; auto takes gather or ulysses, which sends less",
    )
    vocab: Literal["split", "ends"] = Field(
        "split", description="embedding and head split over pipe x tensor, or whole on the first and last stage"
    )

    @field_validator("layers_per_stage", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        # pydantic would report a mistake twice, once for each member of the union.
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
