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


LONG = "a é猫😀\n€ ß  x�y 👩‍👩‍👧 " * 12


@pytest.mark.parametrize("make", [ByteTokenizer, Llama2])
@pytest.mark.parametrize("first", range(7))
def test_a_long_text_is_the_one_that_is_decoded_at_once(make: Any, first: int) -> None:
    text = LONG[first:]
    prompt = text.encode()[:5].decode(errors="ignore")
    tokens = make().encode(text)
    stream = TextStream(make(), prompt=tokens[:5])
    assert "".join([*(stream.add(token) for token in tokens[5:]), stream.finish()]) == text[len(prompt) :]


@given(st.binary(min_size=60, max_size=200))
def test_many_bytes_decode_in_a_stream_as_they_do_at_once(tokens: bytes) -> None:
    assert "".join(pieces_of(tokens)) == ByteTokenizer().decode(tokens)


@given(st.lists(st.sampled_from([1, 2, *(3 + byte for byte in "é😀 ".encode())]), max_size=200))
def test_words_and_bytes_in_any_order_lose_no_word_and_no_space(tokens: list[int]) -> None:
    """Bytes that are no text may be told otherwise than at once: a decoder replaces all around them."""
    stream = TextStream(Llama2(), prompt=[1])
    text = "".join([*(stream.add(token) for token in tokens), stream.finish()])
    assert text.count(" Hello") == tokens.count(1)
    assert text.count(" world") == tokens.count(2)


class Counted(ByteTokenizer):
    """Notes how many tokens are decoded."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def decode(self, tokens: Sequence[int]) -> str:
        """As `ByteTokenizer`."""
        self.counts.append(len(tokens))
        return super().decode(tokens)


def test_the_cost_of_a_token_does_not_grow_with_the_stream() -> None:
    tokenizer = Counted()
    stream, tokens = TextStream(tokenizer), tokenizer.encode(LONG * 10)
    for token in tokens:
        stream.add(token)
    assert max(tokenizer.counts) <= 70
    assert sum(tokenizer.counts) <= 60 * len(tokens)
