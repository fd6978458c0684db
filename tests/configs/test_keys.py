"""The keys of a run file are frozen, and help and reference list each of them."""

from collections.abc import Callable
from pathlib import Path

from trellax.configs.run_config import config_keys, render_help, render_reference

Golden = Callable[[str, str], None]
ROOT = Path(__file__).parents[2]


def test_keys_are_frozen(golden: Golden) -> None:
    assert len(config_keys()) <= 140
    golden("config_keys.txt", "\n".join(config_keys()))


def test_help_names_every_key_with_its_default(golden: Golden) -> None:
    golden("config_help.txt", render_help())


def test_reference_page_lists_every_key_as_the_code_has_it() -> None:
    assert (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8") == render_reference()
    assert all(f"| `{name.partition('.')[2]}` |" in render_reference() for name in config_keys())


def test_every_key_has_a_meaning() -> None:
    bare = [line for line in render_help().splitlines() if line and len(line.split(maxsplit=3)) < 4]
    assert bare == []
