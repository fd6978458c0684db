"""Stop strings in a text cut at any places end it where they would end the whole text."""

from hypothesis import given
from hypothesis import strategies as st
from trellax.serve.stop_strings import StopStrings

letters = st.text(alphabet="ab", max_size=12)


@given(pieces=st.lists(letters, max_size=6), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces: list[str], stops: list[str]) -> None:
    found = StopStrings(stops)
    shown = [found.add(piece) for piece in pieces]
    text = "".join(shown) + found.finish()
    whole = ""
    for piece in pieces:
        whole += piece
        begins = [whole.index(stop) for stop in stops if stop in whole]
        if begins:
            assert (text, found.has_stopped) == (whole[: min(begins)], True)
            return
    assert (text, found.has_stopped) == (whole, False)


@given(pieces=st.lists(letters, max_size=6))
def test_without_stop_strings_nothing_is_held_back(pieces: list[str]) -> None:
    assert [StopStrings([]).add(piece) for piece in pieces] == pieces
