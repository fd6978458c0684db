"""Small blocks for the tests of this folder, so that attention reads several."""

from collections.abc import Iterator

import pytest
from trellax.layers.attention import cached


@pytest.fixture(autouse=True, scope="session")
def small_blocks() -> Iterator[None]:
    """Attention reads four tokens at a time: a cache of 24 has 6 blocks, of which a window skips some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "BLOCK", 4)
        patch.setattr(cached, "MOST_BLOCK", 4)
        yield
