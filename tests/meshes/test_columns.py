"""Rows of words as aligned columns, in plain text and in Markdown."""

from trellax.meshes.columns import align, align_markdown

ROWS = [("mesh", "bytes"), ("data=2", "7")]


def test_columns_after_the_first_are_aligned_right_as_numbers_are() -> None:
    assert align(ROWS) == "mesh    bytes\ndata=2      7"


def test_markdown_has_a_rule_below_the_head() -> None:
    assert align_markdown(ROWS) == "| mesh   | bytes |\n|--------|-------|\n| data=2 |     7 |"


def test_markdown_of_text_alone_is_aligned_left() -> None:
    assert align_markdown(ROWS, left=2) == "| mesh   | bytes |\n|--------|-------|\n| data=2 | 7     |"
