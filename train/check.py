"""The checks that need two sections of a run at once, made before any array is.

Each check yields the errors it finds, so that a run with three mistakes says all three. Read `loop.py` next.
"""

from collections.abc import Iterable, Iterator

from ..layers import ModelConfig
from ..meshes import ConfigError, MeshError, MeshSpec, ModelError, ScheduleError, TrellaxError, suggest
from .config import RunConfig

_BYTES = 256


def check_run(config: RunConfig, *, num_devices: int, known_schedules: Iterable[str] | None = None) -> MeshSpec:
    """Return the mesh of a run with -1 filled in, once the run is known to fit it.

    Args:
        known_schedules: names that `pipeline.schedule` may have; those of trellax if left out.

    Raises:
        TrellaxError: the one thing that does not fit, or a ConfigError that lists all of them.
    """
    found: list[TrellaxError] = []
    mesh = config.mesh
    try:
        mesh = mesh.resolve(num_devices=num_devices)
    except MeshError as error:
        found.append(error)
    if min(mesh.sizes.values()) > 0:
        found += [*_check_widths(config.model, tensor=mesh.tensor), *_check_depth(config.model, pipe=mesh.pipe)]
        found += _check_batch(config, data=mesh.data)
    found += [*_check_schedule(config.pipeline.schedule, known=known_schedules), *_check_lengths(config)]
    found += _check_corpus(config)
    if not found:
        return mesh
    raise found[0] if len(found) == 1 else _join(found)


def _check_widths(model: ModelConfig, *, tensor: int) -> Iterator[TrellaxError]:
    for name, what in (("num_heads", "heads are"), ("ffn_size", "the feed-forward is"), ("vocab_size", "the table is")):
        size = getattr(model, name)
        if size % tensor:
            larger = -(-size // tensor) * tensor
            padded = f"pad it: model.{name}={larger}, whose last {larger - size} ids no text uses"
            fix = padded if name == "vocab_size" else f"set model.{name}={larger}"
            yield ModelError(
                f"model.{name}={size} does not split over mesh.tensor={tensor}: {what} divided evenly, "
                f"but {size} / {tensor} = {size / tensor:.2f}.",
                fix=f"{fix}, or choose a tensor size that divides {size}.",
            )
    kv = model.num_kv_heads
    if kv % tensor and tensor % kv:
        yield ModelError(
            f"model.num_kv_heads={kv} neither splits over mesh.tensor={tensor} nor can be copied evenly to it: "
            f"{max(kv, tensor)} / {min(kv, tensor)} = {max(kv, tensor) / min(kv, tensor):.2f}.",
            fix=f"make one a multiple of the other, mesh.tensor={kv} say.",
        )


def _check_depth(model: ModelConfig, *, pipe: int) -> Iterator[TrellaxError]:
    layers = model.num_layers
    if layers < pipe:
        yield ModelError(
            f"model.num_layers={layers} cannot fill mesh.pipe={pipe} stages: a stage has at least one layer.",
            fix=f"set mesh.pipe={layers} or less, or model.num_layers={pipe} or more.",
        )
    elif layers % pipe:
        yield ModelError(
            f"model.num_layers={layers} does not split into mesh.pipe={pipe} equal stages: "
            f"{layers} / {pipe} = {layers / pipe:.2f}.",
            fix=f"set model.num_layers={-(-layers // pipe) * pipe}, or choose a pipe size that divides {layers}.",
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


def _check_schedule(name: str, *, known: Iterable[str] | None) -> Iterator[TrellaxError]:
    if known is None:
        from ..pipeline.schedules import SCHEDULES

        known = SCHEDULES
    names = sorted(known)
    if name not in names:
        yield ScheduleError(
            f"pipeline.schedule={name!r} is no schedule.{suggest(name, names)}", fix=f"use one of {', '.join(names)}."
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


def _check_corpus(config: RunConfig) -> Iterator[TrellaxError]:
    source, paths, vocab_size = config.data.source, config.data.paths, config.model.vocab_size
    if source != "tokens" and vocab_size < _BYTES:
        yield ModelError(
            f"model.vocab_size={vocab_size} is too small for data.source={source!r}, whose tokens are bytes, 0 to 255.",
            fix=f"set model.vocab_size={_BYTES}.",
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


def _join(errors: list[TrellaxError]) -> ConfigError:
    lines = [f"{len(errors)} things do not fit together:"]
    lines += [f"  {error.problem}" + (f"\n    Fix: {error.fix}" if error.fix else "") for error in errors]
    return ConfigError("\n".join(lines))
