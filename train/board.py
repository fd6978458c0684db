"""TensorBoard's events of a run: each logged line is one record, on its way to the disk before the next step.

A process can be killed between a line of metrics.jsonl and its record, so a log that is opened again first writes what
the files before it lack. An event file is a row of records: length, checksum of the length, an `Event`, its checksum.
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
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from ..meshes.files.regular_file import open_regular

BOARD_FOLDER = "tensorboard"

_EVENTS: Any = event_pb2
"""Its classes are made when it is imported, so no type checker knows them."""

_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.(?:([0-9]{9})\.)?.*", re.DOTALL)
"""When a file was begun: seconds, and nanoseconds where trellax wrote it. TensorBoard reads files by name."""

_LARGEST_RECORD = 1 << 24


class Board:
    """A writer of TensorBoard events into a file of its own.

    Steps after `resumed_step` will be taken again, so TensorBoard is told to drop them.

    Args:
        lines: what metrics.jsonl holds up to that step; numbers that no event file has are written anew.
    """

    def __init__(self, folder: Path, *, lines: Sequence[Mapping[str, Any]], resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        there = read_steps(folder)
        lacking = [line["step"] for line in lines for name in _scalars(line) if line["step"] not in there.get(name, ())]
        # From the first number that is missing all are written again, in order: TensorBoard draws lines as they come.
        first = min(lacking, default=resumed_step + 1)
        self._file = _create_file(folder)
        self._append(_EVENTS.Event(file_version="brain.Event:2"))
        start = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._append(_EVENTS.Event(step=first, session_log=start))
        for line in lines:
            if line["step"] >= first:
                self.write(line["step"], _scalars(line))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the finite numbers of one step."""
        if values:
            scalars = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
            self._append(_EVENTS.Event(step=step, summary={"value": scalars}))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        # Not fsync: what the system has, it keeps when the process is killed.
        self._file.flush()


def read_steps(folder: Path) -> dict[str, set[int]]:
    """Return the steps that TensorBoard finds in the event files of a folder, by the name of the number."""
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
                    found.setdefault(value.tag, set()).add(event.step)
    return found


def _read_events(file: BinaryIO) -> Iterator[Any]:
    """Yield the events of a file up to its end, or to a record that was cut off or damaged."""
    while len(head := file.read(12)) == 12:
        length = int.from_bytes(head[:8], "little")
        if head[8:] != _checksum(head[:8]) or length > _LARGEST_RECORD:
            return
        data = file.read(length + 4)
        if len(data) < length + 4:
            return
        try:
            yield _EVENTS.Event.FromString(data[:length])
        except DecodeError:
            return


def _create_file(folder: Path) -> BinaryIO:
    """Create a file whose name comes after all that are there, whatever the clock says."""
    begun = [match for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]  # noqa: PTH208
    last_ns = max((int(match[1]) * 10**9 + int(match[2] or 10**9 - 1) for match in begun), default=0)
    seconds, rest_ns = divmod(max(time.time_ns(), last_ns + 1), 10**9)
    path = folder / f"events.out.tfevents.{seconds:010d}.{rest_ns:09d}.{socket.gethostname()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
