"""The text of an answer ends at a stop string of several tokens, which the tokens of the request do not know."""

from trellax.commands.generation.answer_text import AnswerText, read_stops, stop_tokens
from trellax.hub.text_stream import ByteTokenizer
from trellax.serve import Request, ServedSequence


def test_text_ends_before_a_stop_of_several_tokens() -> None:
    request = Request(prompt=(1,))
    answer, sequence = AnswerText(ByteTokenizer(), request, ["END"]), ServedSequence(id=0, request=request)
    pieces = [answer.add(token) for token in b"a E b END c"]
    assert "".join(pieces) == answer.text == "a E b "
    assert answer.has_stopped
    assert answer.finish() == ""
    assert bytes(answer.kept(list(b"a E b END c"))) == b"a E b END"
    sequence.finish_reason = "cancelled"
    assert answer.finish_reason(sequence) == "stop"


def test_beginning_of_a_stop_at_the_end_is_a_part_of_the_answer() -> None:
    answer = AnswerText(ByteTokenizer(), Request(prompt=(1,)), ["END"])
    assert "".join(answer.add(token) for token in b"a EN") == "a "
    assert answer.finish() == "EN"
    assert (answer.text, answer.has_stopped) == ("a EN", False)


def test_stops_of_one_token_are_tokens_too() -> None:
    stops = read_stops([r"\n", "end", ""])
    assert stops == ["\n", "end"]
    assert stop_tokens(stops, ByteTokenizer()) == [10]
