"""Every key of a TOML text is found at its line, in no time however the text looks."""

import time

import pytest
from trellax.configs.toml_lines import map_lines


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["\n" * 99_980, "#\n" * 49_990, f"[{'a.' * 40}a]\nb = 1\n", "[[a]]\n" * 16_000])
def test_lines_of_a_large_file_are_mapped_quickly(text: str) -> None:
    start_s = time.process_time()
    lines = map_lines(f"{text}[x]\ny = 1\n")
    assert lines["x", "y"] == text.count("\n") + 2
    assert time.process_time() - start_s < 5


def test_line_map_knows_dotted_quoted_and_nested_keys() -> None:
    text = 'a.b = 1\n[x] # note\n"c" = 2\nd = [\n  1,\n]\n[x.y]\ne=3\n'
    lines = {("a",): 1, ("a", "b"): 1, ("x",): 2, ("x", "c"): 3, ("x", "d"): 4, ("x", "y"): 7, ("x", "y", "e"): 8}
    assert map_lines(text) == lines


def test_line_map_takes_no_line_of_a_text_for_a_key() -> None:
    text = "[a]\nx = '''\n[b]\ny = 1\n'''\n\n# [b]\n[[c]]\nz = 1\n\n[[c]]\n[b]\ny = 2\n"
    lines = {("a",): 1, ("a", "x"): 2, ("c",): 8, ("c", "z"): 9, ("b",): 12, ("b", "y"): 13}
    assert map_lines(text) == lines
