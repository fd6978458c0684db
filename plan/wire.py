"""Protocol buffers without their schema: the numbered fields of a serialized message.

XLA hands its buffer assignment out as bytes, and installs no Python classes to read them. The encoding is public and
small (protobuf.dev, "Encoding"). Read `buffers.py` next.
"""

from collections.abc import Iterator

Fields = dict[int, list[int | bytes]]
"""Values of every field number, in order; messages and texts as bytes, packed numbers too."""


def read_fields(message: bytes) -> Fields:
    """Return the fields of a message.

    Raises:
        ValueError: the bytes are no message.
    """
    fields: Fields = {}
    for number, value in _read(message):
        fields.setdefault(number, []).append(value)
    return fields


def number_of(fields: Fields, number: int) -> int:
    """Return a whole number, 0 where it is left out, as protocol buffers leave out zeros."""
    values = fields.get(number, [0])
    last = values[-1]
    return last if isinstance(last, int) else 0


def text_of(fields: Fields, number: int) -> str:
    """Return a text, empty where it is left out."""
    return next((value.decode() for value in fields.get(number, []) if isinstance(value, bytes)), "")


def messages_of(fields: Fields, number: int) -> Iterator[Fields]:
    """Yield the messages of a repeated field, in order."""
    return (read_fields(value) for value in fields.get(number, []) if isinstance(value, bytes))


def numbers_of(fields: Fields, number: int) -> tuple[int, ...]:
    """Return the whole numbers of a repeated field, packed or not."""
    found: list[int] = []
    for value in fields.get(number, []):
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            item, at = _varint(value, at)
            found.append(item)
    return tuple(found)


def _read(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(message):
            raise ValueError(f"not a protocol buffer: field {number} of kind {kind} at byte {at}")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("not a protocol buffer: it ends inside a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
