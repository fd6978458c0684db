"""Check the sections of a run config against each other and against the devices, before any array is made.

Each check yields its errors, so that all mistakes of a config are reported at once. The checks of divisibility by mesh
sizes are in `mesh_checks.py`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from ..layers.lora.linears import adapted_names
from ..layers.own.load import check_classes
from ..meshes import ConfigError, MeshError, MeshSpec, ModelError, ScheduleError, ShardingRules, TrellaxError
from ..meshes.arguments import check_choice, check_count
from ..meshes.errors import suggest
from ..schedules import SCHEDULES, Family
from .corpora.paths import find_files, find_validation_files
from .corpora.prepared import is_prepared
from .mesh_checks import errors_of, find_mesh_errors
from .preference_checks import find_preference_errors
from .rate_schedules import find_rate_errors
from .run_config import RunConfig

_NUM_BYTES = 256
_ENDINGS = {"text": "txt", "tokens": "bin", "pairs": "jsonl"}

CorpusFiles = Literal["needed", "later"]
"""Whether the files of the corpus must exist: `train` needs them at once, `describe` does not."""


def check_run(
    config: RunConfig,
    *,
    num_devices: int,
    known_schedules: Iterable[str] | None = None,
    corpus: CorpusFiles = "later",
) -> MeshSpec:
    """Check a run config against itself and the devices, and return its mesh with -1 replaced by a size.

    Args:
        known_schedules: names that `pipeline.schedule` may have; those of `SCHEDULES` if left out.
        corpus: whether the files of the corpus must exist; they are not read.

    Raises:
        TrellaxError: the config has a mistake; with several, a ConfigError lists all of them.
    """
    check_count("num_devices", num_devices, error=MeshError)
    check_choice("corpus", corpus, get_args(CorpusFiles), error=ConfigError)
    found: list[TrellaxError] = []
    mesh = config.mesh
    try:
        mesh = mesh.resolve(num_devices=num_devices)
    except MeshError as error:
        found.append(error)
    # A mesh size is still -1 if it cannot be resolved; that error has been added above.
    classes = list(errors_of(check_classes, config.model))
    found += classes
    if min(mesh.sizes.values()) > 0 and not classes:
        found += errors_of(ShardingRules.of(mesh.roles).check_axes, mesh.sizes)
        found += find_mesh_errors(config, mesh)
    found += _check_schedule(config, pipe=mesh.pipe, known=known_schedules)
    for check in (_check_lengths, _check_adapters, _check_corpus, _check_ends, _check_blend):
        found += check(config)
    found += find_preference_errors(config, mesh)
    if corpus == "needed":
        found += _check_corpus_files(config)
    if not found:
        return mesh
    raise found[0] if len(found) == 1 else _join(found)


def _check_schedule(config: RunConfig, *, pipe: int, known: Iterable[str] | None) -> Iterator[TrellaxError]:
    name, limit = config.pipeline.schedule, config.pipeline.max_in_flight
    names = sorted(SCHEDULES if known is None else known)
    family = SCHEDULES.get(name)
    if limit and (family is None or "max_in_flight" not in family.takes):
        yield ScheduleError(
            f"pipeline.max_in_flight={limit} is for the schedule auto alone; {name} takes no limit.",
            fix="set pipeline.schedule='auto', or leave pipeline.max_in_flight out.",
        )
    if name.endswith(".csv"):
        # With several ranks a missing file is an error when it is read; with one rank it is never read.
        if pipe == 1 and not Path(name).is_file():
            yield ScheduleError(
                f"pipeline.schedule={name!r}: there is no such file.",
                fix="give the path of a CSV file, or the name of a schedule.",
            )
    elif name not in names:
        yield ScheduleError(
            f"pipeline.schedule={name!r} is not a schedule.{suggest(name, names)}",
            fix=f"use one of {', '.join(names)}, or a .csv of your own.",
        )
    elif pipe > 1 and family is not None:
        yield from _check_chunks(family, config.pipeline.chunks, names=names)


def _check_chunks(family: Family, chunks: int, *, names: list[str]) -> Iterator[TrellaxError]:
    """Yield an error unless a rank can have this number of chunks in the schedule's family."""
    if family.allows_chunks(chunks):
        return
    if family.chunks == "two":
        yield ScheduleError(
            f"pipeline.schedule={family.name!r} with pipeline.chunks={chunks}: a V-shaped schedule has two chunks on "
            "each rank, one on the way down the ranks and one on the way back.",
            fix="set pipeline.chunks to 2.",
        )
        return
    wants = "2 or more" if chunks == 1 else "1"
    other = family.counterpart
    yield ScheduleError(
        f"pipeline.schedule={family.name!r} with pipeline.chunks={chunks}: interleaved schedules take turns between "
        "chunks, the others have one.",
        fix=f"set pipeline.chunks to {wants}" + (f", or pipeline.schedule={other!r}." if other in names else "."),
    )


def _check_lengths(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error if sequences are longer than the model reads, warm-up than the run, or saves are never kept."""
    seq_len, max_tokens = config.data.seq_len, config.model.max_tokens
    if seq_len > max_tokens:
        yield ModelError(
            f"data.seq_len={seq_len} is longer than model.max_tokens={max_tokens}, the longest sequence it can read.",
            fix=f"set model.max_tokens={seq_len}, or data.seq_len={max_tokens}.",
        )
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    if warmup > steps:
        yield ConfigError(
            f"optimizer.warmup_steps={warmup} is more than train.steps={steps}: the learning rate would never peak.",
            fix=f"set optimizer.warmup_steps={max(1, steps // 10)}, a tenth of the steps.",
        )
    yield from find_rate_errors(config)
    if config.train.patience and not config.train.eval_every:
        yield ConfigError(
            f"train.patience={config.train.patience} counts validations, but train.eval_every=0 validates only at the "
            "end.",
            fix=f"set train.eval_every={max(1, steps // 20)}, a twentieth of the steps, or leave train.patience out.",
        )
    keep_every = config.checkpoint.keep_every
    if keep_every and not config.checkpoint.every:
        yield ConfigError(
            f"checkpoint.keep_every={keep_every} keeps saves on the way, but checkpoint.every=0 saves only at the end.",
            fix=f"set checkpoint.every={keep_every}, or leave checkpoint.keep_every out.",
        )


def _check_adapters(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error for each choice that has no use where adapters alone are trained."""
    rank = config.model.lora_rank
    if rank and not adapted_names(config.model):
        yield ConfigError(
            f"model.lora_rank={rank} with model.lora_targets={list(config.model.lora_targets)}: nothing would be "
            "trained.",
            fix="leave model.lora_targets out, for adapters on all linear layers of blocks.",
        )
    if rank and config.optimizer.kind == "muon":
        yield ConfigError(
            f"optimizer.kind='muon' updates kernels, and model.lora_rank={rank} trains none of them.",
            fix="set optimizer.kind='adamw'.",
        )
    if rank and config.train.offload == "optimizer":
        yield ConfigError(
            f"train.offload='optimizer' with model.lora_rank={rank}: the moments of adapters are too small to gain by "
            "it.",
            fix="leave train.offload out.",
        )


def _check_corpus(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error for each contradiction between source, paths, tokenizer and vocabulary."""
    source, paths, vocab_size = config.data.source, config.data.paths, config.model.vocab_size
    if source != "tokens" and config.data.tokenizer == "bytes" and vocab_size < _NUM_BYTES:
        yield ModelError(
            f"model.vocab_size={vocab_size} is too small for data.source={source!r}, whose tokens are bytes, 0 to 255.",
            fix=f"set model.vocab_size={_NUM_BYTES}.",
        )
    if source == "tokens" and config.data.tokenizer != "bytes":
        yield ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} is given, but data.source='tokens' reads ids, not text.",
            fix="set data.source='text', or leave data.tokenizer out.",
        )
    if source == "chat" and config.data.tokenizer == "bytes":
        yield ConfigError(
            "data.source='chat' needs a chat template, which is beside a model's tokenizer; data.tokenizer='bytes' has "
            "none.",
            fix="set data.tokenizer to the folder of a model that chats.",
        )
    if source != "stdlib" and not paths:
        suffix = {"tokens": "bin", "chat": "jsonl"}.get(source, "txt")
        yield ConfigError(
            f"data.source={source!r} reads files, but data.paths is empty.",
            fix=f'set data.paths, for example to ["corpus/*.{suffix}"].',
        )
    if source == "stdlib" and paths:
        yield ConfigError(
            f"data.paths={list(paths)} is given, but data.source='stdlib' reads no files.",
            fix="set data.source='text' or 'tokens'.",
        )


def _check_ends(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error unless it is known where documents end, if that is needed."""
    source, paths, vocab_size = config.data.source, config.data.paths, config.model.vocab_size
    needs, end_id = config.data.needs_documents, config.data.end_id
    if needs and source == "tokens" and end_id < 0 and not all(map(is_prepared, paths)):
        yield ConfigError(
            f"{needs} takes the ends of documents, and data.source='tokens' does not say which id ends one.",
            fix="set data.end_id, 50256 for GPT-2's tokenizer.",
        )
    is_ended = source == "chat" or (source != "tokens" and config.data.tokenizer == "bytes")
    if end_id >= 0 and (is_ended or (not needs and source != "pairs")):
        why = "bytes have no such token: each file is a document" if source != "chat" else "each chat is a document"
        why = why if needs else "data.packing is 'off'"
        yield ConfigError(f"data.end_id={end_id} is given, but {why}.", fix="leave it out.")
    if end_id >= vocab_size:
        yield ModelError(
            f"data.end_id={end_id} is no id of model.vocab_size={vocab_size}, which knows 0 to {vocab_size - 1}.",
            fix="set the id that ends a document.",
        )


def _check_blend(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error unless a blend has a weight above 0 for each path."""
    weights, paths = config.data.weights, config.data.paths
    if weights and len(weights) != len(paths):
        yield ConfigError(
            f"data.weights has {len(weights)} numbers, and data.paths has {len(paths)} paths.",
            fix="give each path one weight: a glob, or a folder, is one path.",
        )
    elif weights and min(weights) <= 0:
        yield ConfigError(
            f"data.weights has {min(weights):g}; a weight is above 0.", fix="leave out the path that has no weight."
        )


def _check_corpus_files(config: RunConfig) -> Iterator[TrellaxError]:
    if config.data.source != "stdlib" and config.data.paths:
        yield from errors_of(find_files, config.data.paths)
    for name, paths in config.data.validation_paths.items():
        yield from errors_of(find_validation_files, name, paths)


def _join(errors: list[TrellaxError]) -> ConfigError:
    lines = [f"{len(errors)} things do not fit together:"]
    lines += [f"  {error.problem}" + (f"\n    Fix: {error.fix}" if error.fix else "") for error in errors]
    return ConfigError("\n".join(lines))
