"""The commands of the README, as printed and in their order, in a folder where nothing was before.

Folders with models and texts are the reader's; small ones of the same kinds stand in for them. Trainings that do not
say how many steps take thirty instead of their config's two hundred; else every word is the README's.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from trellax.configs import RunConfig, load_config

from .test_house import COMMANDS, README, ROOT, run_as_user

MODELS = {"llama": "llama2", "Llama-3.2-1B": "llama32", "Llama-3.1-8B": "llama3", "Qwen3-0.6B": "qwen3"}
ROOM = 1024
FEW = "30"

# What `make quickstart` runs; the rest of it installs.
FIRST = "trellax train configs/quickstart.toml"


def in_order() -> list[list[str]]:
    return [shlex.split(command) for command in (FIRST, *COMMANDS)]


def test_no_command_of_the_readme_finds_the_folder_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs: dict[Path, RunConfig] = {}
    made: set[str] = set()
    for _, name, *words in in_order():
        if name == "train" and words != ["--help"]:
            path, *flags = words
            for flag in ("--profile", "--fake-devices"):
                if flag in flags:
                    at = flags.index(flag)
                    del flags[at : at + 2]
            config = load_config(path, flags)
            assert runs.setdefault(config.run_folder, config).model_dump() == config.model_dump()
        if name in ("import-hf", "export-hf"):
            assert words[1] not in made
            made.add(words[1])


# Two dozen processes, six of which train.
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    _lay_out(tmp_path)
    for words in in_order():
        if words[1] == "train" and "--train.steps" not in words and "--help" not in words:
            words += ["--train.steps", FEW]
        done = run_as_user(["-m", "trellax.commands.cli", *words[1:]], folder=tmp_path)
        is_absent = "h100:64/8" in words and done.returncode == 2 and "CUDA plugin" in done.stderr
        assert is_absent or done.returncode == 0, (words, done.stderr[-2000:])
    assert "trellax.plan" in README


def _lay_out(folder: Path) -> None:
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text(README * 4, encoding="utf-8")
    (folder / "prompts.txt").write_text("one two\nthree\n", encoding="utf-8")
    for name, golden in MODELS.items():
        model = folder / "models" / name
        shutil.copytree(ROOT / "tests" / "golden" / "hf" / golden, model)
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | {"max_position_embeddings": ROOM}))
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
        tokenizer.save(str(model / "tokenizer.json"))
