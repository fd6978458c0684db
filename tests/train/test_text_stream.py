"""Text while tokens come: no character is shown before all of it is there, and none is lost."""

from hypothesis import given
from hypothesis import strategies as st
from trellax.train.text_stream import ByteTokenizer, TextStream


def pieces_of(tokens: bytes) -> list[str]:
    stream = TextStream(ByteTokenizer())
    return [*(stream.add(token) for token in tokens), stream.finish()]


def test_a_character_of_several_bytes_comes_whole() -> None:
    assert pieces_of("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_what_is_cut_off_is_shown_at_the_end() -> None:
    assert pieces_of("é".encode()[:1]) == ["", "\N{REPLACEMENT CHARACTER}"]


@given(st.binary(max_size=40))
def test_any_bytes_come_to_what_they_are_as_a_whole(tokens: bytes) -> None:
    assert "".join(pieces_of(tokens)) == ByteTokenizer().decode(tokens)


@given(st.text(max_size=20))
def test_text_survives(text: str) -> None:
    tokenizer = ByteTokenizer()
    text = text.encode("utf-8", errors="replace").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(pieces_of(bytes(tokenizer.encode(text)))) == text


def test_ids_that_are_no_bytes_are_left_out() -> None:
    assert ByteTokenizer().decode([104, 300, 105]) == "hi"
