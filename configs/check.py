"""The checks that need two sections of a run at once, made before any array is.

Each check yields the errors it finds, so that a run with three mistakes says all three. Read `../train/loop.py` next.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from ..layers import ModelConfig
from ..meshes import ConfigError, DataError, MeshError, MeshSpec, ModelError, ScheduleError, TrellaxError, suggest
from ..meshes.arguments import check_choice, check_count
from ..pipeline import resolve_layers
from ..pipeline.schedules import SCHEDULES
from .corpus_paths import find_files
from .run_config import RunConfig

_BYTES = 256
_MOST_CELLS = 50_000
_MOST_CELLS_OF_AUTO = 10_000
"""Stages x microbatches of a schedule that is made within some 20 seconds."""


CorpusFiles = Literal["needed", "later"]
"""Whether the files of the corpus must be there; a run is also described where they are not."""


def check_run(
    config: RunConfig,
    *,
    num_devices: int,
    known_schedules: Iterable[str] | None = None,
    corpus: CorpusFiles = "later",
) -> MeshSpec:
    """Return the mesh of a run with -1 filled in, once the run is known to fit it.

    Args:
        known_schedules: names that `pipeline.schedule` may have; those of trellax if left out.
        corpus: whether its files must be there; none is read.

    Raises:
        TrellaxError: the one thing that does not fit, or a ConfigError that lists all of them.
    """
    check_count("num_devices", num_devices, error=MeshError)
    check_choice("corpus", corpus, get_args(CorpusFiles), error=ConfigError)
    found: list[TrellaxError] = []
    mesh = config.mesh
    try:
        mesh = mesh.resolve(num_devices=num_devices)
    except MeshError as error:
        found.append(error)
    if min(mesh.sizes.values()) > 0:
        found += _check_widths(config.model, tensor=mesh.tensor)
        found += _check_vocab(config, tensor=mesh.tensor, pipe=mesh.pipe)
        found += _check_depth(config, pipe=mesh.pipe)
        found += _check_batch(config, data=mesh.data)
        found += _check_cells(config, pipe=mesh.pipe)
    found += [*_check_schedule(config, pipe=mesh.pipe, known=known_schedules), *_check_lengths(config)]
    found += _check_corpus(config)
    if corpus == "needed":
        found += _check_files(config)
    if not found:
        return mesh
    raise found[0] if len(found) == 1 else _join(found)


def _check_widths(model: ModelConfig, *, tensor: int) -> Iterator[TrellaxError]:
    for name, what in (("num_heads", "heads are"), ("ffn_size", "the feed-forward is")):
        size = getattr(model, name)
        if size % tensor:
            larger = -(-size // tensor) * tensor
            yield ModelError(
                f"model.{name}={size} does not split over mesh.tensor={tensor}: {what} divided evenly, "
                f"but {size} / {tensor} = {size / tensor:.2f}.",
                fix=f"set model.{name}={larger}, or choose a tensor size that divides {size}.",
            )
    kv = model.num_kv_heads
    if kv % tensor and tensor % kv:
        yield ModelError(
            f"model.num_kv_heads={kv} neither splits over mesh.tensor={tensor} nor can be copied evenly to it: "
            f"{max(kv, tensor)} / {min(kv, tensor)} = {max(kv, tensor) / min(kv, tensor):.2f}.",
            fix=f"make one a multiple of the other, mesh.tensor={kv} say.",
        )


def _check_vocab(config: RunConfig, *, tensor: int, pipe: int) -> Iterator[TrellaxError]:
    size = config.model.vocab_size
    is_split = pipe > 1 and config.pipeline.vocab == "split"
    parts, axes = (tensor * pipe, f"mesh.pipe={pipe} x mesh.tensor={tensor}") if is_split else (tensor, "")
    if size % parts:
        larger = -(-size // parts) * parts
        padded = f"pad it: model.vocab_size={larger}, whose last {larger - size} ids no text uses"
        other = [] if size % tensor == 0 else [f"choose a tensor size that divides {size}"]
        if is_split:
            other.append("set pipeline.vocab='ends', which splits it over tensor alone")
        yield ModelError(
            f"model.vocab_size={size} does not split over {axes or f'mesh.tensor={tensor}'}: the table is divided "
            f"evenly, but {size} / {parts} = {size / parts:.2f}.",
            fix=f"{padded}, or {' and '.join(other)}.",
        )


def _check_depth(config: RunConfig, *, pipe: int) -> Iterator[TrellaxError]:
    layers, chunks = config.model.num_layers, config.pipeline.chunks
    if pipe == 1:
        yield from _check_given_layers(config)
        return
    stages = pipe * chunks
    what = f"mesh.pipe={pipe}" if chunks == 1 else f"mesh.pipe={pipe} x pipeline.chunks={chunks} = {stages}"
    if layers < stages:
        yield ModelError(
            f"model.num_layers={layers} cannot fill {what} stages: a stage has at least one layer.",
            fix=f"set mesh.pipe={max(1, layers // chunks)} or less, or model.num_layers={stages} or more.",
        )
    elif not config.pipeline.schedule.endswith(".csv"):  # A file has chunks of its own, known once it is read.
        try:
            resolve_layers(
                config.model,
                num_ranks=pipe,
                num_chunks=chunks,
                layers_per_stage=config.pipeline.layers_per_stage,
                num_tokens=config.data.seq_len,
                vocab=config.pipeline.vocab,
            )
        except ScheduleError as error:
            yield error


def _check_given_layers(config: RunConfig) -> Iterator[TrellaxError]:
    """One rank has all layers; a list for stages that a config may get later must still be one of this model."""
    layers, given = config.model.num_layers, config.pipeline.layers_per_stage
    if given != "auto" and (sum(given) != layers or min(given) < 1):
        shown = ",".join(map(str, given))
        yield ScheduleError(
            f"pipeline.layers_per_stage={shown} has {sum(given)} layers in {len(given)} stages, but "
            f"model.num_layers={layers}, and a stage has at least one.",
            fix=f"give counts whose sum is {layers}, or leave pipeline.layers_per_stage out.",
        )


def _check_batch(config: RunConfig, *, data: int) -> Iterator[TrellaxError]:
    batch, parts = config.train.batch_size, config.pipeline.microbatches
    if batch % (parts * data):
        larger = -(-batch // (parts * data)) * parts * data
        yield ConfigError(
            f"train.batch_size={batch} does not split into pipeline.microbatches={parts} over mesh.data={data}: "
            f"{batch} / ({parts} x {data}) = {batch / (parts * data):.2f} sequences a device and microbatch.",
            fix=f"set train.batch_size={larger}, or other microbatches.",
        )


def _check_schedule(config: RunConfig, *, pipe: int, known: Iterable[str] | None) -> Iterator[TrellaxError]:
    name, chunks, limit = config.pipeline.schedule, config.pipeline.chunks, config.pipeline.max_in_flight
    names = sorted(SCHEDULES if known is None else known)
    family = SCHEDULES.get(name)
    if limit and (family is None or "max_in_flight" not in family.takes):
        yield ScheduleError(
            f"pipeline.max_in_flight={limit} is for the schedule auto alone; {name} takes no limit.",
            fix="set pipeline.schedule='auto', or leave pipeline.max_in_flight out.",
        )
    if name.endswith(".csv"):
        # What is in a file is checked when the run is set up, on one rank never.
        if pipe == 1 and not Path(name).is_file():
            yield ScheduleError(
                f"pipeline.schedule={name!r}: there is no such file.",
                fix="give the path of a CSV file, or the name of a schedule.",
            )
        return
    if name not in names:
        yield ScheduleError(
            f"pipeline.schedule={name!r} is no schedule.{suggest(name, names)}",
            fix=f"use one of {', '.join(names)}, or a .csv of your own.",
        )
    elif pipe > 1 and family is not None and not family.allows_chunks(chunks):
        wants = "2 or more" if chunks == 1 else "1"
        other = family.counterpart
        fix = f"set pipeline.chunks to {wants}" + (f", or pipeline.schedule={other!r}." if other in names else ".")
        yield ScheduleError(
            f"pipeline.schedule={name!r} with pipeline.chunks={chunks}: interleaved schedules take turns between "
            "chunks, the others have one.",
            fix=fix,
        )


def _check_cells(config: RunConfig, *, pipe: int) -> Iterator[TrellaxError]:
    name, chunks, microbatches = config.pipeline.schedule, config.pipeline.chunks, config.pipeline.microbatches
    is_searched = name in SCHEDULES and SCHEDULES[name].order == "searched"
    most = _MOST_CELLS_OF_AUTO if is_searched else _MOST_CELLS
    stages = pipe * chunks if pipe > 1 else 1
    if stages * microbatches > most:
        yield ScheduleError(
            f"pipeline.microbatches={microbatches} over {stages} stages are {stages * microbatches} forwards a step; "
            f"a schedule has at most {most}.",
            fix=f"set pipeline.microbatches={max(1, most // stages)} or less.",
        )


def _check_lengths(config: RunConfig) -> Iterator[TrellaxError]:
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
    keep_every = config.checkpoint.keep_every
    if keep_every and not config.checkpoint.every:
        yield ConfigError(
            f"checkpoint.keep_every={keep_every} keeps saves on the way, but checkpoint.every=0 saves only at the end.",
            fix=f"set checkpoint.every={keep_every}, or leave checkpoint.keep_every out.",
        )


def _check_corpus(config: RunConfig) -> Iterator[TrellaxError]:
    source, paths, vocab_size = config.data.source, config.data.paths, config.model.vocab_size
    if source != "tokens" and config.data.tokenizer == "bytes" and vocab_size < _BYTES:
        yield ModelError(
            f"model.vocab_size={vocab_size} is too small for data.source={source!r}, whose tokens are bytes, 0 to 255.",
            fix=f"set model.vocab_size={_BYTES}.",
        )
    if source == "tokens" and config.data.tokenizer != "bytes":
        yield ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} is given, but data.source='tokens' reads ids, not text.",
            fix="set data.source='text', or leave data.tokenizer out.",
        )
    if source != "stdlib" and not paths:
        yield ConfigError(
            f"data.source={source!r} reads files, but data.paths is empty.",
            fix=f'set data.paths = ["corpus/*.{"bin" if source == "tokens" else "txt"}"], say.',
        )
    if source == "stdlib" and paths:
        yield ConfigError(
            f"data.paths={list(paths)} is given, but data.source='stdlib' reads no files of yours.",
            fix="set data.source='text' or 'tokens'.",
        )


def _check_files(config: RunConfig) -> Iterator[TrellaxError]:
    if config.data.source != "stdlib" and config.data.paths:
        try:
            find_files(config.data.paths)
        except DataError as error:
            yield error


def _join(errors: list[TrellaxError]) -> ConfigError:
    lines = [f"{len(errors)} things do not fit together:"]
    lines += [f"  {error.problem}" + (f"\n    Fix: {error.fix}" if error.fix else "") for error in errors]
    return ConfigError("\n".join(lines))
