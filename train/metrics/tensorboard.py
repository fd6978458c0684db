"""Write the TensorBoard events of a run: one record per logged step, flushed before the next step.

An event file is a sequence of TFRecords:

    length (8 bytes) | checksum of the length (4) | serialized `Event` | checksum of the event (4)

A process can be killed after a line of metrics.jsonl and before its record, so a writer that is opened again first
writes the records that the files before it lack.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError
from tensorboardX.proto import event_pb2, plugin_hparams_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from ...meshes.files.regular_file import open_regular

BOARD_FOLDER = "tensorboard"

_EVENTS: Any = event_pb2
_SUMMARY: Any = summary_pb2
_HPARAMS: Any = plugin_hparams_pb2
"""Any, since protobuf makes the classes of these modules when they are imported: type checkers do not see them."""

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.(?:([0-9]{9})\.)?.*", re.DOTALL)
"""Name of an event file: its start in seconds, then nanoseconds if trellax wrote it. TensorBoard reads by name."""

_HPARAMS_TAG, _HPARAMS_PLUGIN, _HPARAMS_VERSION = "_hparams_/session_start_info", "hparams", 0

_MAX_RECORD_BYTES = 1 << 24


class EventWriter:
    """Append scalars to a new TensorBoard event file.

    Steps after `resumed_step` will be taken again, so TensorBoard is told to drop them.

    Args:
        lines: the lines of metrics.jsonl up to `resumed_step`; values that no event file holds are written again.
        hyperparameters: shown in TensorBoard's HPARAMS tab; numbers, booleans and texts keep their type.
    """

    def __init__(
        self,
        folder: Path,
        *,
        lines: Sequence[Mapping[str, Any]],
        resumed_step: int,
        hyperparameters: Mapping[str, object],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        there = read_steps(folder)
        missing = [line["step"] for line in lines for name in _scalars(line) if line["step"] not in there.get(name, ())]
        # From the first missing value on all are written again: TensorBoard draws points in the order of the file.
        first = min(missing, default=resumed_step + 1)
        self._file = _create_file(folder)
        self._append(_EVENTS.Event(file_version="brain.Event:2"))
        start = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._append(_EVENTS.Event(step=first, session_log=start))
        if hyperparameters:
            self._append(_EVENTS.Event(summary=_hyperparameter_summary(hyperparameters)))
        for line in lines:
            if line["step"] >= first:
                self.write(line["step"], _scalars(line))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the scalars of one step, all of them finite."""
        if values:
            scalars = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
            self._append(_EVENTS.Event(step=step, summary={"value": scalars}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        # flush, not fsync: the operating system keeps what it was given when the process is killed.
        self._file.flush()


def read_steps(folder: Path) -> dict[str, set[int]]:
    """Return the steps of each scalar, by its tag, as TensorBoard would read them from a folder's event files."""
    found: dict[str, set[int]] = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        if "tfevents" not in name:
            continue
        with open_regular(folder / name, links="refuse") as file:
            for event in _read_events(file):
                if event.HasField("session_log") and event.session_log.status == _EVENTS.SessionLog.START:
                    left = {tag: {step for step in steps if step < event.step} for tag, steps in found.items()}
                    found = {tag: steps for tag, steps in left.items() if steps}
                for value in event.summary.value:
                    # Hyperparameters are a summary without a scalar.
                    if value.HasField("simple_value"):
                        found.setdefault(value.tag, set()).add(event.step)
    return found


def _hyperparameter_summary(hyperparameters: Mapping[str, object]) -> Any:
    """Return the summary that TensorBoard's hparams plugin reads: a `SessionStartInfo` in a tag's metadata.

    The plugin derives its table's columns from the runs it finds, so no `Experiment` summary is needed.
    """
    info = _HPARAMS.SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters.items():
        # bool first: Python's True is also an int.
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = str(value)
    content = _HPARAMS.HParamsPluginData(session_start_info=info, version=_HPARAMS_VERSION).SerializeToString()
    plugin = _SUMMARY.SummaryMetadata.PluginData(plugin_name=_HPARAMS_PLUGIN, content=content)
    metadata = _SUMMARY.SummaryMetadata(plugin_data=plugin)
    return _SUMMARY.Summary(value=[_SUMMARY.Summary.Value(tag=_HPARAMS_TAG, metadata=metadata)])


def _read_events(file: BinaryIO) -> Iterator[Any]:
    """Yield the events of a file up to its end, or up to the first truncated or damaged record."""
    while len(head := file.read(12)) == 12:
        length = int.from_bytes(head[:8], "little")
        if head[8:] != _checksum(head[:8]) or length > _MAX_RECORD_BYTES:
            return
        data = file.read(length + 4)
        if len(data) < length + 4:
            return
        try:
            yield _EVENTS.Event.FromString(data[:length])
        except DecodeError:
            return


def _create_file(folder: Path) -> BinaryIO:
    """Create an event file whose name sorts after all others in the folder, even if the clock was set back."""
    starts = [match for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]  # noqa: PTH208
    last_ns = max((int(match[1]) * 10**9 + int(match[2] or 10**9 - 1) for match in starts), default=0)
    seconds, rest_ns = divmod(max(time.time_ns(), last_ns + 1), 10**9)
    path = folder / f"events.out.tfevents.{seconds:010d}.{rest_ns:09d}.{socket.gethostname()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
