"""Read TensorBoard's event files with its own protobuf classes, every checksum compared."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2, plugin_hparams_pb2


def crc32c(data: bytes) -> int:
    """The checksum of event files, bit by bit as its definition says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def read_events(file: Path) -> list[Any]:
    """The events of a file, every checksum compared; a record that was cut off ends it."""
    content, events, place = file.read_bytes(), [], 0
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 8], "little")
        data = content[place + 12 : place + 12 + length]
        if len(content) < place + length + 16:
            break
        assert content[place + 8 : place + 12] == masked(content[place : place + 8])
        assert content[place + 12 + length : place + length + 16] == masked(data)
        events.append(event_pb2.Event.FromString(data))  # pyrefly: ignore[missing-attribute]
        place += length + 16
    return events


def hyperparameters(folder: Path) -> list[dict[str, Any]]:
    """What each event file holds for the hparams plugin, by name, in Python's types."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in read_events(file):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    assert value.tag == "_hparams_/session_start_info"
                    content: Any = plugin_hparams_pb2
                    data = content.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    assert data.version == 0
                    info = data.session_start_info
                    found.append({name: getattr(one, one.WhichOneof("kind")) for name, one in info.hparams.items()})
    return found
