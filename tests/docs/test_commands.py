"""The commands of README.md and of the site: all are understood; a page's run in their order, where nothing was before.

Folders with models and texts are the reader's; small ones of the same kinds stand in for them. Trainings that do not
say how many steps take thirty; else every word is the page's.
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from trellax.commands import cli
from trellax.commands.registry import find_command, import_function
from trellax.configs import RunConfig, check_run, load_config
from trellax.meshes import MeshSpec
from trellax.plan import read_topology

from .pages import PAGES, ROOT, blocks_of, commands_of, name_of, run_as_user

FEW = "30"
WITH_CONFIG = ("train", "describe", "inspect", "plan")
WITH_OWN_FILES = ("data", "runs", "sweep")

COMMANDS = sorted(
    {(name_of(page), command) for page in PAGES for block in blocks_of(page) for command in commands_of(block)}
)
RUNNABLE = [page for page in PAGES if any(commands_of(block) and not block.title for block in blocks_of(page))]


class ReachedError(Exception):
    """The command line has understood its words."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_command_is_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    _lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    if "--help" in words or "--version" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
    elif words[0] in WITH_CONFIG:
        _check_config(words, monkeypatch)
    elif words[0] in WITH_OWN_FILES:
        args, check = cli._parse(cli._split_overrides(words)[0]), find_command(words[0]).check
        assert check is None or import_function(check)(args) is None
    elif words[0] == "calibrate":
        monkeypatch.setattr("trellax.commands.planning.calibrate.run_calibrate", lambda _: 0)
        assert cli.main(words) == 0
    elif words[0] == "schedule" and "--file" not in words:
        assert cli.main(words) == 0
    else:
        _check_folders(words, capsys)


def _check_config(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(*args: Any, **options: Any) -> NoReturn:
        raise ReachedError(load_config(*args, **options))

    monkeypatch.setattr("trellax.configs.run_config.load_config", reach)
    if words[1].startswith("runs/"):
        # What an earlier command of the page has made.
        words = [words[0], "quickstart", *words[2:]]
    with pytest.raises(ReachedError) as caught:
        cli.main(words)
    config = caught.value.config
    if "--topology" in words:
        # A file is what an earlier command of the page has written.
        names = [name for name in words[words.index("--topology") + 1].split(",") if not name.endswith(".toml")]
        assert all(read_topology(name).num_devices for name in names)
    # A target, or the machine that a page is about, has as many devices as the mesh needs.
    num_devices = config.run.fake_devices or config.mesh.num_devices
    assert check_run(config, num_devices=num_devices)


def _check_folders(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command on folders of the reader, which are not there: it must say so, and nothing of its words."""
    words = [word.replace("models/", "absent/") for word in words]
    meshes = [words[at + 1] for at, word in enumerate(words) if word in ("--mesh", "--meshes")]
    assert all(MeshSpec.parse(mesh).num_devices for text in meshes for mesh in text.split(";"))
    if words[0] == "bench-decode":
        words[1] = "runs/absent"
    assert cli.main(words) == 2
    # The class of mistakes in words is TrellaxError itself.
    assert not capsys.readouterr().err.startswith("TrellaxError")


def test_no_two_trainings_of_a_page_share_a_folder_unless_one_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    for page in RUNNABLE:
        seen: dict[Path, RunConfig] = {}
        for words in _in_order(page):
            if words[0] == "train" and "--help" not in words and not words[1].startswith("runs/"):
                config = load_config(words[1], _without_options(words[2:]))
                free = {"mesh", "pipeline", "checkpoint"}
                first = seen.setdefault(config.run_folder, config)
                assert first.model_dump(exclude=free) == config.model_dump(exclude=free), (name_of(page), words)


# Up to ten processes a page.
@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_commands_of_a_page_run_in_their_order(page: Path, tmp_path: Path) -> None:
    _lay_out(tmp_path)
    _make_what_was_made_elsewhere(page, tmp_path)
    for words in _in_order(page):
        if words[0] == "train" and "--train.steps" not in words and "--help" not in words:
            words += ["--train.steps", FEW]
        done = run_as_user(["-m", "trellax.commands.cli", *words], folder=tmp_path)
        assert done.returncode == 0, (words, done.stderr[-2000:])


def _in_order(page: Path) -> list[list[str]]:
    blocks = [block for block in blocks_of(page) if not block.title]
    return [shlex.split(command)[1:] for block in blocks for command in commands_of(block)]


def _without_options(words: list[str]) -> list[str]:
    """Leave the overrides of a config alone."""
    kept = list(words)
    for option in ("--profile", "--fake-devices"):
        while option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return [word for word in kept if word not in ("--override", "--fresh", "--force", "--json")]


def _make_what_was_made_elsewhere(page: Path, folder: Path) -> None:
    is_made_here = any(words[:2] == ["train", "quickstart"] for words in _in_order(page))
    if "runs/quickstart" in page.read_text(encoding="utf-8") and not is_made_here:
        train = ["train", "quickstart", "--train.steps", "4", "--optimizer.warmup_steps", "1"]
        assert run_as_user(["-m", "trellax.commands.cli", *train], folder=folder).returncode == 0


def _lay_out(folder: Path) -> None:
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "notes").mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "notes" / "a.txt").write_text(readme * 20, encoding="utf-8")
    rows = [json.dumps({"id": number, "text": f"{number} times {number} is {number**2}."}) for number in range(20_000)]
    (folder / "squares.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    pairs = [{"prompt": f"{n} + 2 = ", "chosen": str(n + 2), "rejected": str(n + 3)} for n in range(200)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    turns = [
        [{"role": "user", "content": f"{i} times {i}?"}, {"role": "assistant", "content": f"It is {i * i}."}]
        for i in range(5_000)
    ]
    chats = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (folder / "chats.jsonl").write_text(chats, encoding="utf-8")
    (folder / "prompts.txt").write_text("one two\nthree\n", encoding="utf-8")
    model = folder / "models" / "llama"
    shutil.copytree(ROOT / "tests" / "golden" / "hf" / "llama2", model)
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 1024}), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
