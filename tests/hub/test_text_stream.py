"""Text is decoded while tokens come: no character is shown before all its bytes are there, and none is lost."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from trellax.hub.text_stream import ByteTokenizer, TextStream


def pieces_of(tokens: bytes) -> list[str]:
    stream = TextStream(ByteTokenizer())
    return [*(stream.add(token) for token in tokens), stream.finish()]


def test_character_of_several_bytes_is_shown_whole() -> None:
    assert pieces_of("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_incomplete_character_is_shown_at_the_end() -> None:
    assert pieces_of("é".encode()[:1]) == ["", "\N{REPLACEMENT CHARACTER}"]


@given(st.binary(max_size=40))
def test_bytes_decode_in_a_stream_as_they_do_at_once(tokens: bytes) -> None:
    assert "".join(pieces_of(tokens)) == ByteTokenizer().decode(tokens)


@given(st.text(max_size=20))
def test_text_survives(text: str) -> None:
    tokenizer = ByteTokenizer()
    text = text.encode("utf-8", errors="replace").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(pieces_of(bytes(tokenizer.encode(text)))) == text


def test_ids_that_are_no_bytes_are_left_out() -> None:
    assert ByteTokenizer().decode([104, 300, 105]) == "hi"


class Llama2:
    """Pieces with a mark for the space before them, and bytes for what is in no piece, as sentencepiece has them."""

    def __init__(self) -> None:
        pieces = ["<unk>", "▁Hello", "▁world", *(f"<0x{byte:02X}>" for byte in range(256))]
        ids = {piece: number for number, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        self._tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        """Return one token for each byte."""
        return [3 + byte for byte in text.encode()]

    encode_prompt = encode

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(list(ids))


def test_character_is_shown_whole_if_each_byte_decodes_to_a_replacement_character() -> None:
    stream = TextStream(Llama2())
    assert [stream.add(token) for token in Llama2().encode("é😀")] == ["", "é", "", "", "", "😀"]


def test_an_answer_after_a_prompt_that_is_cut_within_a_character_is_whole() -> None:
    stream = TextStream(Llama2(), prompt=Llama2().encode("😀猫😀"))
    assert stream.add(*Llama2().encode("é")) + stream.finish() == "é"


@pytest.mark.parametrize("before", ["", "x", "猫", "😀猫😀", "\N{REPLACEMENT CHARACTER}"])
@pytest.mark.parametrize("make", [ByteTokenizer, Llama2])
def test_a_character_that_the_prompt_begins_and_the_answer_ends_is_shown(make: Any, before: str) -> None:
    for cut in (1, 2, 3):
        tokens = make().encode(f"{before}😀")
        stream = TextStream(make(), prompt=tokens[: len(tokens) - cut])
        assert stream.add(*tokens[len(tokens) - cut :]) + stream.finish() == "😀"


@pytest.mark.parametrize("make", [ByteTokenizer, Llama2])
def test_prompt_that_ends_with_a_replacement_character_is_not_shown_again(make: Any) -> None:
    stream = TextStream(make(), prompt=make().encode("x\N{REPLACEMENT CHARACTER}"))
    assert stream.add(*make().encode("y")) + stream.finish() == "y"


def test_the_space_between_prompt_and_answer_is_part_of_the_answer() -> None:
    stream = TextStream(Llama2(), prompt=[1])
    assert stream.add(2) + stream.finish() == " world"
