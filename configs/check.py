"""Check what needs two sections of a run at once, before any array is made.

Every check yields the errors that it finds, so that a run with three mistakes is told all three.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from ..layers import ModelConfig
from ..meshes import ConfigError, MeshError, MeshSpec, ModelError, ScheduleError, TrellaxError, suggest
from ..meshes.arguments import check_choice, check_count
from ..meshes.divisibility import check_divides, nearest_multiples
from ..pipeline import resolve_layers
from ..pipeline.schedules import SCHEDULES
from .corpus_paths import find_files
from .run_config import RunConfig

_NUM_BYTES = 256
_MAX_FORWARDS = 50_000
_MAX_FORWARDS_OF_AUTO = 10_000
"""Stages x microbatches of a schedule that is built within some 20 seconds."""

CorpusFiles = Literal["needed", "later"]
"""Whether the files of the corpus must exist; `trellax describe` shows a run without them."""


def check_run(
    config: RunConfig,
    *,
    num_devices: int,
    known_schedules: Iterable[str] | None = None,
    corpus: CorpusFiles = "later",
) -> MeshSpec:
    """Check that the sections of a run fit each other and the devices, and return its mesh with -1 filled in.

    Args:
        known_schedules: names that `pipeline.schedule` may have; those of trellax if left out.
        corpus: whether its files must exist; none is read.

    Raises:
        TrellaxError: the one mistake, or a ConfigError that lists all of them.
    """
    check_count("num_devices", num_devices, error=MeshError)
    check_choice("corpus", corpus, get_args(CorpusFiles), error=ConfigError)
    found: list[TrellaxError] = []
    mesh = config.mesh
    try:
        mesh = mesh.resolve(num_devices=num_devices)
    except MeshError as error:
        found.append(error)
    # Where -1 cannot be filled in, there is nothing to divide by.
    if min(mesh.sizes.values()) > 0:
        found += _check_on_mesh(config, mesh)
    found += _check_schedule(config, pipe=mesh.pipe, known=known_schedules)
    found += _check_lengths(config)
    found += _check_corpus(config)
    if corpus == "needed":
        found += _check_corpus_files(config)
    if not found:
        return mesh
    raise found[0] if len(found) == 1 else _join(found)


def check_batch_splits(config: RunConfig, *, data: int) -> None:
    """Check that every microbatch has the same number of sequences on each of `data` shards.

    Raises:
        ConfigError: the batch size is not a multiple of microbatches x shards.
    """
    batch, microbatches = config.train.batch_size, config.pipeline.microbatches
    if batch % (microbatches * data):
        _, larger = nearest_multiples(batch, microbatches * data)
        raise ConfigError(
            f"train.batch_size={batch} does not split into pipeline.microbatches={microbatches} over mesh.data={data}: "
            f"{batch} / ({microbatches} x {data}) = {batch / (microbatches * data):.2f} sequences a device and "
            "microbatch.",
            fix=f"set train.batch_size={larger}, or other microbatches.",
        )


def _check_on_mesh(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    yield from _check_widths(config.model, tensor=mesh.tensor)
    yield from _check_vocab(config, tensor=mesh.tensor, pipe=mesh.pipe)
    yield from _check_depth(config, pipe=mesh.pipe)
    yield from _errors_of(check_batch_splits, config, data=mesh.data)
    yield from _check_forwards(config, pipe=mesh.pipe)


def _check_widths(model: ModelConfig, *, tensor: int) -> Iterator[TrellaxError]:
    """Check that query heads and feed-forward split over tensor, and key/value heads split or can be replicated."""
    for name, what in (("num_heads", "heads are"), ("ffn_size", "the feed-forward is")):
        yield from _errors_of(
            check_divides,
            f"model.{name}",
            getattr(model, name),
            over="mesh.tensor",
            parts=tensor,
            error=ModelError,
            rule=f"{what} divided evenly, but ",
        )
    kv = model.num_kv_heads
    if kv % tensor and tensor % kv:
        yield ModelError(
            f"model.num_kv_heads={kv} neither splits over mesh.tensor={tensor} nor can be copied evenly to it: "
            f"{max(kv, tensor)} / {min(kv, tensor)} = {max(kv, tensor) / min(kv, tensor):.2f}.",
            fix=f"make one a multiple of the other, for example mesh.tensor={kv}.",
        )


def _check_vocab(config: RunConfig, *, tensor: int, pipe: int) -> Iterator[TrellaxError]:
    """Check that the vocabulary splits over tensor, or over pipe x tensor where the pipeline splits it too."""
    size = config.model.vocab_size
    is_split = pipe > 1 and config.pipeline.vocab == "split"
    parts = tensor * pipe if is_split else tensor
    over = f"mesh.pipe={pipe} x mesh.tensor={tensor}" if is_split else "mesh.tensor"
    _, larger = nearest_multiples(size, parts)
    padded = f"pad it: model.vocab_size={larger}, whose last {larger - size} ids no text uses"
    other = [] if size % tensor == 0 else [f"choose a tensor size that divides {size}"]
    if is_split:
        other.append("set pipeline.vocab='ends', which splits it over tensor alone")
    yield from _errors_of(
        check_divides,
        "model.vocab_size",
        size,
        over=over,
        parts=parts,
        error=ModelError,
        rule="the table is divided evenly, but ",
        fix=f"{padded}, or {' and '.join(other)}.",
    )


def _check_depth(config: RunConfig, *, pipe: int) -> Iterator[TrellaxError]:
    """Check that every stage gets a layer, and that layers given for each stage are as many as the model has."""
    layers, chunks = config.model.num_layers, config.pipeline.chunks
    if pipe == 1:
        yield from _check_layers_of_one_rank(config)
        return
    stages = pipe * chunks
    what = f"mesh.pipe={pipe}" if chunks == 1 else f"mesh.pipe={pipe} x pipeline.chunks={chunks} = {stages}"
    if layers < stages:
        yield ModelError(
            f"model.num_layers={layers} cannot fill {what} stages: a stage has at least one layer.",
            fix=f"set mesh.pipe={max(1, layers // chunks)} or less, or model.num_layers={stages} or more.",
        )
    elif not config.pipeline.schedule.endswith(".csv"):  # A file has chunks of its own, known once it is read.
        yield from _errors_of(
            resolve_layers,
            config.model,
            num_ranks=pipe,
            num_chunks=chunks,
            layers_per_stage=config.pipeline.layers_per_stage,
            num_tokens=config.data.seq_len,
            vocab=config.pipeline.vocab,
        )


def _check_layers_of_one_rank(config: RunConfig) -> Iterator[TrellaxError]:
    """Check `layers_per_stage` although one rank has all layers: the config may get more ranks later."""
    layers, given = config.model.num_layers, config.pipeline.layers_per_stage
    if given != "auto" and (sum(given) != layers or min(given) < 1):
        shown = ",".join(map(str, given))
        yield ScheduleError(
            f"pipeline.layers_per_stage={shown} has {sum(given)} layers in {len(given)} stages, but "
            f"model.num_layers={layers}, and a stage has at least one.",
            fix=f"give counts whose sum is {layers}, or leave pipeline.layers_per_stage out.",
        )


def _check_schedule(config: RunConfig, *, pipe: int, known: Iterable[str] | None) -> Iterator[TrellaxError]:
    name, limit = config.pipeline.schedule, config.pipeline.max_in_flight
    names = sorted(SCHEDULES if known is None else known)
    if limit and name != "auto":
        yield ScheduleError(
            f"pipeline.max_in_flight={limit} is for the schedule auto alone; {name} takes no limit.",
            fix="set pipeline.schedule='auto', or leave pipeline.max_in_flight out.",
        )
    if name.endswith(".csv"):
        # With several ranks the file is read when the run is set up; with one it never is.
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
    elif pipe > 1 and name != "auto":
        yield from _check_chunks(name, config.pipeline.chunks, names=names)


def _check_chunks(name: str, chunks: int, *, names: list[str]) -> Iterator[TrellaxError]:
    """Check that an interleaved schedule has several chunks a rank, and any other has one."""
    if name.startswith("interleaved") == (chunks > 1):
        return
    wants = "2 or more" if chunks == 1 else "1"
    other = name.removeprefix("interleaved-") if chunks == 1 else f"interleaved-{name}"
    yield ScheduleError(
        f"pipeline.schedule={name!r} with pipeline.chunks={chunks}: interleaved schedules take turns between "
        "chunks, the others have one.",
        fix=f"set pipeline.chunks to {wants}" + (f", or pipeline.schedule={other!r}." if other in names else "."),
    )


def _check_forwards(config: RunConfig, *, pipe: int) -> Iterator[TrellaxError]:
    """Check that the schedule is small enough to be built in seconds."""
    name, chunks, microbatches = config.pipeline.schedule, config.pipeline.chunks, config.pipeline.microbatches
    most = _MAX_FORWARDS_OF_AUTO if name == "auto" else _MAX_FORWARDS
    stages = pipe * chunks if pipe > 1 else 1
    if stages * microbatches > most:
        yield ScheduleError(
            f"pipeline.microbatches={microbatches} over {stages} stages are {stages * microbatches} forwards a step; "
            f"a schedule has at most {most}.",
            fix=f"set pipeline.microbatches={max(1, most // stages)} or less.",
        )


def _check_lengths(config: RunConfig) -> Iterator[TrellaxError]:
    """Check the sequence length against the model's, and warm-up and saves against the steps."""
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
    """Check that source, paths, tokenizer and vocabulary go together."""
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
    if source != "stdlib" and not paths:
        yield ConfigError(
            f"data.source={source!r} reads files, but data.paths is empty.",
            fix=f'set data.paths, for example to ["corpus/*.{"bin" if source == "tokens" else "txt"}"].',
        )
    if source == "stdlib" and paths:
        yield ConfigError(
            f"data.paths={list(paths)} is given, but data.source='stdlib' reads no files.",
            fix="set data.source='text' or 'tokens'.",
        )


def _check_corpus_files(config: RunConfig) -> Iterator[TrellaxError]:
    if config.data.source != "stdlib" and config.data.paths:
        yield from _errors_of(find_files, config.data.paths)


def _errors_of(check: Callable[..., object], *args: Any, **options: Any) -> Iterator[TrellaxError]:
    """Call a check that raises, and yield its error if it does."""
    try:
        check(*args, **options)
    except TrellaxError as error:
        yield error


def _join(errors: list[TrellaxError]) -> ConfigError:
    lines = [f"{len(errors)} things do not fit together:"]
    lines += [f"  {error.problem}" + (f"\n    Fix: {error.fix}" if error.fix else "") for error in errors]
    return ConfigError("\n".join(lines))
