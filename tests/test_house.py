"""The house rules that no linter knows, and a README that is true: tree, commands, scripts and pictures."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from trellax.commands import cli
from trellax.configs import RunConfig, check_run
from trellax.meshes import MeshSpec
from trellax.pipeline import build_schedule
from trellax.train import draw_schedule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

ROOMS = sorted(path.name for path in (ROOT / ".src" / "trellax").iterdir())
FOLDERS = [*ROOMS, "benchmarks", "docs", "tests", ".ci"]

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 40
MAX_FLAT_FILES = 22
MAX_SHARE_OF_LINES = 0.2

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt)/\w")
REGISTRY = re.compile(r"pypi[.]|pythonhosted[.]|index[-]url|artifactor[y]|[/@]npm[.]")


def files_of(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def block_with(text: str) -> list[str]:
    (block,) = (block for block in blocks_of("text") if text in block)
    return block.splitlines()


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_by(path: Path) -> set[str]:
    """Files that a file imports, for types alone and inside of functions too; the names of a room belong to no file."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*path.relative_to(ROOT).parts[: -node.level], *(node.module or "").split(".")]
            base = ROOT.joinpath(*filter(None, parts))
            named = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
            found |= {module_of(file) for file in named if file.is_file()}
    return found


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules that are left when all that import none of those left are taken away, both ways."""
    left = dict(imports)
    while True:
        used = set().union(*left.values()) if left else set()
        ends = {name for name in left if not left[name] & left.keys() or name not in used}
        if not ends:
            return sorted(left)
        left = {name: left[name] for name in left if name not in ends}


PYTHON = [path for path in files_of(*ROOMS, "benchmarks", "tests") if path.suffix == ".py"]
TEXTS = [*(path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"), *files_of(*FOLDERS)]
COMMANDS = [
    line.partition("  #")[0].rstrip()
    for block in blocks_of("bash")
    for line in block.splitlines()
    if line.startswith("trellax ")
]
SCRIPTS = blocks_of("python")


def test_no_file_is_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_file_names_a_machine_or_a_package_registry() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "home/me/x",
        "cd /" + "work/main",
        '"/' + 'tmp/x"',
        "https://py" + "pi.org/simple",
        "--index" + "-url=x",
    ],
)
def test_machine_paths_and_registries_are_recognised(line: str) -> None:
    assert MACHINE_PATH.search(line) or REGISTRY.search(line)


def test_no_folder_has_many_files() -> None:
    folders = [folder for room in ROOMS for folder in [ROOT / room, *(ROOT / room).rglob("*/")]]
    counts = {
        name_of(folder): len([file for file in folder.glob("*.py") if file.stem != "__init__"]) for folder in folders
    }
    assert {name: count for name, count in counts.items() if count > MAX_FLAT_FILES} == {}


def test_no_room_holds_more_than_a_fifth_of_the_lines() -> None:
    lines = {room: sum(count_lines(file) for file in files_of(room) if file.suffix == ".py") for room in ROOMS}
    total = sum(lines.values())
    assert {room: count / total for room, count in lines.items() if count > MAX_SHARE_OF_LINES * total} == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    found = find_circle({module_of(file): imported_by(file) for file in PYTHON if file.parts[len(ROOT.parts)] in ROOMS})
    assert found == []


@pytest.mark.parametrize(
    ("imports", "circle"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, ["a", "b", "c"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
    ],
)
def test_circles_are_found(imports: dict[str, set[str]], circle: list[str]) -> None:
    assert find_circle(imports) == circle


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_named_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`(?:python )?([\w./-]+/[\w.-]+\.(?:py|toml|md|txt))`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_named_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make (\w+)", text, flags=re.MULTILINE)) - set(targets) == set()


def test_schedule_in_the_readme_is_what_the_code_draws() -> None:
    schedule = build_schedule("1f1b", num_ranks=4, num_microbatches=8)
    assert block_with("4 ranks") == draw_schedule(schedule).splitlines()


def test_excerpt_in_the_readme_is_what_describe_prints() -> None:
    golden = (ROOT / "tests" / "golden" / "describe_quickstart.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in block_with("mesh      data=2") if line not in golden] == []


class ReachedError(Exception):
    """The command line has understood its words."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config


def reach(config: RunConfig, **_: object) -> NoReturn:
    raise ReachedError(config)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_in_the_readme_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trellax.train.loop.train", lambda config, **_: reach(config))
    monkeypatch.setattr("trellax.train.loop.prepare", reach)
    monkeypatch.setattr("trellax.commands.inspect.run_inspect", lambda config, args: reach(config))
    monkeypatch.setattr("trellax.commands.plan.run_plan", lambda config, args, **_: reach(config))
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        return
    if words[0] == "schedule":
        assert cli.main(words) == 0
        return
    if words[0].endswith("-hf") or words[0] in ("generate", "bench-decode", "checkpoints"):
        # The folders are the reader's.
        args = vars(cli._make_parser(words).parse_args(words))
        assert all(
            MeshSpec.parse(mesh).num_devices for mesh in (args.get("mesh") or args.get("meshes") or "").split(";")
        )
        return
    with pytest.raises(ReachedError) as caught:
        cli.main(words)
    config = caught.value.config
    # A target has as many devices as the mesh needs.
    num_devices = config.mesh.num_devices if words[0] in ("inspect", "plan") else config.run.fake_devices or 1
    assert check_run(config, num_devices=num_devices)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "describe" in command])
def test_describe_in_the_readme_runs(command: str) -> None:
    done = run_as_user(["-m", "trellax.commands.cli", *shlex.split(command)[1:]], folder=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1f1b" in done.stdout


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_script_in_the_readme_runs(number: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPTS[number], encoding="utf-8")
    done = run_as_user(["script.py"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout or "bytes of cache" in done.stdout


def run_as_user(words: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a person would, without what conftest.py sets for the tests but its compilation cache."""
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env["PYTHONPATH"] = str(ROOT / ".src")
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
