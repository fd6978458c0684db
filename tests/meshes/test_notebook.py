import base64
from xml.etree import ElementTree

import pytest
from trellax.meshes.notebook import picture_html, table_html, text_html


@pytest.mark.parametrize(("kind", "media_type"), [("png", "image/png"), ("svg", "image/svg+xml")])
def test_picture_travels_inside_its_tag(kind, media_type):
    tag = picture_html(b"\x89<svg>", format=kind, alt='a "plan" <1>')
    image = ElementTree.fromstring(tag.removesuffix(">") + "/>")
    head, _, data = image.attrib["src"].partition(",")
    assert image.attrib["alt"] == 'a "plan" <1>'
    assert head == f"data:{media_type};base64"
    assert base64.b64decode(data) == b"\x89<svg>"


def test_table_has_a_head_and_keeps_its_words():
    table = ElementTree.fromstring(table_html([("axis", "bytes"), ("a<b", "1,024")]))
    words = [[(cell.tag, cell.text) for cell in row] for row in table]
    assert words == [[("th", "axis"), ("th", "bytes")], [("td", "a<b"), ("td", "1,024")]]


def test_columns_after_the_left_ones_are_aligned_right():
    table = ElementTree.fromstring(table_html([("axis", "kind", "bytes")], left=2))
    assert [cell.attrib["style"] for cell in table[0]] == ["text-align: left"] * 2 + ["text-align: right"]


def test_text_keeps_its_lines_and_escapes_marks():
    block = ElementTree.fromstring(text_html("rank 0 |  <0F0>\nrank 1 |  ."))
    assert block.text == "rank 0 |  <0F0>\nrank 1 |  ."
