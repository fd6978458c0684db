"""From a Hugging Face folder to a run and back on the command line, and every mistake with exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from trellax.commands import generate as generate_command
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.hub.read import read_weights
from trellax.serve import Request
from trellax.train import run
from trellax.train.restore import restore_or_initialize

from ..hub.hub import GOLDEN, shapes_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model of 64 ids and a tokenizer of 64 letters."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "llama3", "model")
    letters = {chr(32 + number): number for number in range(64)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save("model/tokenizer.json")
    Path("text.txt").write_text("THE CAT SAT ON THE MAT. " * 200)
    return tmp_path


def tensors_of(folder: str) -> dict[str, bytes]:
    files = map(load_file, Path(folder).glob("*.safetensors"))
    return {name: leaf.tobytes() for tensors in files for name, leaf in tensors.items()}


def test_there_and_back_is_the_same_bit_for_bit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-hf", "model", "runs/mine", "--mesh", "tensor=2,pipe=2", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["architecture"], result["parameters"]) == ("llama", 6736)
    assert "reading   model: llama, 6,736 parameters, on data=1 tensor=2 pipe=2" in err
    assert main(["export-hf", "runs/mine", "back"]) == 0
    assert tensors_of("back") == tensors_of("model")
    assert json.loads(Path("back/config.json").read_text())["eos_token_id"] == 2
    assert Path("back/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["back", "model", "runs", "text.txt"]


SIZES = "--data.seq_len 16 --train.steps 1 --train.batch_size 8 --optimizer.warmup_steps 0 --mesh.data 8"
TEXT = f"--data.source text --data.paths text.txt {SIZES}"


class ReadyError(Exception):
    """A run has everything it trains with."""


def test_training_begins_with_the_weights_and_the_tokenizer_that_are_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["import-hf", "model", "runs/mine"])
    states = []

    def keep_state(*args: Any, **options: Any) -> Any:
        states.append(restore_or_initialize(*args, **options)[0])
        return states[0], None

    def stop(*_: Any, **__: Any) -> None:
        raise ReadyError

    monkeypatch.setattr(run, "restore_or_initialize", keep_state)
    # Compiling the step takes most of the time, and is tested elsewhere.
    monkeypatch.setattr(run, "compile_steps", stop)
    with pytest.raises(ReadyError):
        main(f"train runs/mine/config.toml --run.name other --train.init_from model {TEXT}".split())
    err = capsys.readouterr().err
    assert "weights   of model" in err
    assert f"1 text file by {here.resolve()}/runs/mine/tokenizer.json, 4,801 tokens" in err
    expected = read_weights("model", shapes_of(Path("model")))["embed"]["table"]
    assert np.array_equal(states[0].params.shared["embed"]["table"], expected)
    # Whoever serves or exports the run finds its tokenizer.
    assert Path("runs/other/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()


@pytest.mark.slow
def test_imported_run_trains_on_and_is_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["import-hf", "model", "runs/mine"])
    assert main(f"train runs/mine/config.toml {TEXT}".split()) == 0
    assert "resumed   at step 0" in capsys.readouterr().err
    assert main(["export-hf", "runs/mine", "back", "--dtype", "bfloat16"]) == 0
    files = [load_file(file) for file in Path("back").glob("*.safetensors")]
    assert {leaf.dtype.name for tensors in files for leaf in tensors.values()} == {"bfloat16"}
    assert json.loads(Path("back/config.json").read_text())["dtype"] == "bfloat16"


def test_config_of_an_imported_run_says_its_model_and_stays_short(here: Path) -> None:
    main(["import-hf", "model", "runs/mine"])
    config = load_config("runs/mine/config.toml")
    assert (config.model.rope_scaling, config.model.rope_original_tokens, config.run.name) == ("llama3", 32, "mine")
    # The same in every working directory.
    mine = here.resolve() / "runs" / "mine"
    assert (Path(config.data.tokenizer), config.run_folder) == (mine, mine)
    assert len(Path("runs/mine/config.toml").read_text().splitlines()) <= 45


def test_prompt_begins_with_the_first_token_and_every_end_token_stops_the_answer(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = Tokenizer.from_file("model/tokenizer.json")
    tokenizer.post_processor = processors.TemplateProcessing(single="! $A", special_tokens=[("!", 1)])
    tokenizer.save("model/tokenizer.json")
    Path("model/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    main(["import-hf", "model", "runs/mine"])

    def stop(request: Request, *_: Any, **__: Any) -> None:
        assert (request.prompt, request.stop) == ((1, 33, 34), (3, 2, 7))
        raise ReadyError

    # Compiling takes seconds, and what is asked is known before.
    monkeypatch.setattr(generate_command, "check_request", stop)
    for folder in ("model", "runs/mine"):
        with pytest.raises(ReadyError):
            main(["generate", folder, "--prompt", "AB", "--stop", "#", "--max-new-tokens", "4"])


def test_empty_prompt_becomes_the_first_token_and_unknown_ids_are_ignored(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = Tokenizer.from_file("model/tokenizer.json")
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save("model/tokenizer.json")
    main(["import-hf", "model", "runs/mine"])
    asked = []

    def stop(request: Request, *_: Any, **__: Any) -> None:
        asked.append(request.prompt)
        raise ReadyError

    with monkeypatch.context() as patch:
        patch.setattr(generate_command, "check_request", stop)
        for folder in ("model", "runs/mine"):
            with pytest.raises(ReadyError):
                main(["generate", folder, "--prompt", ""])
    # bos_token_id of config.json: this tokenizer puts nothing before a text.
    assert asked == [(1,), (1,)]
    capsys.readouterr()
    for folder in ("model", "runs/mine"):
        assert main(["generate", folder, "--prompt", "A<pad>", "--max-new-tokens", "4"]) == 2
        assert "token id 64 is not in the vocabulary of 64" in capsys.readouterr().err


@pytest.mark.slow
def test_a_weight_that_is_no_number_ends_generate_with_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted(Path("model").glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][33] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["generate", "model", "--prompt", "AB", "--max-new-tokens", "2", "--chunk", "4"]) == 2
    out, err = capsys.readouterr()
    assert "logits are NaN or infinite" in err
    assert out in ("", "AB")


@pytest.mark.parametrize("out", ["läufe 😀/mine", "a\nb = 1/\x1b[2J"])
def test_folder_may_have_any_name(out: str, here: Path) -> None:
    assert main(["import-hf", "model", out]) == 0
    assert load_config(f"{out}/config.toml").run_folder == here.resolve() / out


def test_trained_run_without_an_origin_is_exported_as_what_is_asked(here: Path) -> None:
    shutil.rmtree("model")
    shutil.copytree(GOLDEN / "mistral", "model")
    main(["import-hf", "model", "runs/mine"])
    Path("runs/mine/hf_config.json").unlink()
    assert main(["export-hf", "runs/mine", "back"]) == 0
    assert json.loads(Path("back/config.json").read_text())["model_type"] == "mistral"
    assert tensors_of("back") == tensors_of("model")


MISTAKES = {
    "import_no_folder": "import-hf nowhere out",
    "import_already_there": "import-hf model text.txt",
    "import_mesh": "import-hf model out --mesh tensor=3",
    "import_mesh_too_large": "import-hf model out --mesh tensor=16",
    "import_words": "import-hf model",
    "import_override": "import-hf model out --train.steps 5",
    "export_no_run": "export-hf model out",
    "export_ambiguous": "export-hf runs/mine out",
    "export_architecture": "export-hf runs/mine out --architecture gpt2",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_with_exit_code_2_and_leaves_nothing(
    name: str, here: Path, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    if "runs/mine" in MISTAKES[name]:
        main(["import-hf", "model", "runs/mine"])
        Path("runs/mine/hf_config.json").unlink()
    capsys.readouterr()
    assert main(MISTAKES[name].split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/cli_{name}.txt", err)
    assert not Path("out").exists()
    assert list(here.glob("*.part*")) == []
