"""What the lab notes say of XLA and of others still holds. One that fails here is a workaround to delete."""

from pathlib import Path

import pytest

from .pages import LAB_NOTES, run_as_user

SAYS = {
    "axis_of_one": "IsManualSubgroup",
    "bfloat16_sum": "Invalid binary instruction opcode copy",
    "flipped_byte": "[0. 0. 0. 2.]",
    # It hangs; XLA:CPU aborts the process after 40 seconds.
    "permute_in_branch": "Termination timeout for `collective permute",
    "ragged_all_to_all": "UNIMPLEMENTED",
    "sum_over_one_device": "1 all-reduce in the program",
}


@pytest.mark.slow
@pytest.mark.parametrize("file", LAB_NOTES, ids=lambda file: file.stem)
def test_lab_note_still_holds(file: Path, tmp_path: Path) -> None:
    done = run_as_user([str(file)], folder=tmp_path, JAX_PLATFORMS="cpu")
    assert SAYS[file.stem] in done.stdout + done.stderr
