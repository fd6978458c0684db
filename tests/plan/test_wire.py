"""Protocol buffers read without a schema."""

import pytest
from trellax.plan.buffers import Place, measure
from trellax.plan.wire import messages_of, number_of, numbers_of, read_fields, text_of

# From protobuf.dev, "Encoding": field 1 is the number 150; field 2 the text "testing"; field 3 holds field 1 = 150.
MESSAGE = bytes.fromhex("089601") + bytes.fromhex("120774657374696e67") + bytes.fromhex("1a03089601")


def test_numbers_texts_and_messages_are_read() -> None:
    fields = read_fields(MESSAGE)
    assert (number_of(fields, 1), text_of(fields, 2)) == (150, "testing")
    assert [number_of(inner, 1) for inner in messages_of(fields, 3)] == [150]
    assert (number_of(fields, 9), text_of(fields, 9)) == (0, "")


def test_packed_numbers_are_read() -> None:
    assert numbers_of(read_fields(bytes.fromhex("3206038e029ea705")), 6) == (3, 270, 86942)


@pytest.mark.parametrize("text", ["0896", "1207746573", "0b"])
def test_what_is_no_message_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a protocol buffer"):
        read_fields(bytes.fromhex(text))


def test_shared_memory_is_measured_once() -> None:
    def place(start: int, end: int, allocation: int = 0) -> Place:
        return Place(allocation=allocation, start=start, end=end)

    assert measure([place(0, 10), place(5, 12), place(20, 30), place(0, 10), place(0, 4, allocation=1)]) == 26
