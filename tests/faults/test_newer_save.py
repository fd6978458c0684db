"""A save of a newer trellax: train, generate and export go on or refuse alike, and `checkpoints` lists it.

Commands that read the whole config name the keys that they leave out; generate reads the model and its tokens alone.
"""

from pathlib import Path

import pytest

from .crafted import reseal
from .zygote import Zygote


@pytest.mark.slow
def test_all_commands_take_a_newer_save_alike(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    words = f"{tiny_words} --run.name newer --checkpoint.keep 1"
    code, child = zygote.run(f"{words} --train.steps 20")
    assert code == 0, child.said()
    run = folder / "newer"
    commands = (
        f"{words} --train.steps 20",
        f"generate {run} --prompt a --max-new-tokens 1",
        f"export-hf {run} {folder}/out",
    )
    reseal(run / "checkpoints" / "20", lambda record: record["config"].update(later={"key": 1}))
    reseal(run / "checkpoints" / "20", lambda record: record["config"]["train"].update(new=1))
    for command in commands:
        code, child = zygote.run(command)
        assert code == 0, child.said()
        reads_all = not command.startswith("generate")
        assert ("train.new" in child.said()) == reads_all
        assert ("later.key" in child.said()) == reads_all
    reseal(run / "checkpoints" / "20", lambda record: record["config"]["model"].update(soft_cap=30.0))
    for command in commands:
        code, child = zygote.run(command.replace("/out", "/out2"))
        assert code == 2
        assert "was saved with model.soft_cap, which this trellax does not know" in child.said()
        assert "Traceback" not in child.said()
    assert zygote.run(f"checkpoints {run} --verify")[0] == 0
