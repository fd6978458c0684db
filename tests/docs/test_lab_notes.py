"""What the lab notes say of XLA and of others still holds. One that fails here is a workaround to delete."""

import subprocess
from pathlib import Path

import pytest

from .pages import LAB_NOTES, run_as_user

SAYS = {
    "bfloat16_sum": "Invalid binary instruction opcode copy",
    "axis_of_one": "IsManualSubgroup",
    "ragged_all_to_all": "UNIMPLEMENTED",
    "permute_in_branch": "hangs",
    "flipped_byte": "[0. 0. 0. 2.]",
}
HANG_S = 20


@pytest.mark.slow
@pytest.mark.parametrize("file", LAB_NOTES, ids=lambda file: file.stem)
def test_lab_note_still_holds(file: Path, tmp_path: Path) -> None:
    try:
        done = run_as_user([str(file)], folder=tmp_path, timeout_s=HANG_S, JAX_PLATFORMS="cpu")
    except subprocess.TimeoutExpired:
        assert SAYS[file.stem] == "hangs"
        return
    assert SAYS[file.stem] in done.stdout + done.stderr
