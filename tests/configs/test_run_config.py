"""A run file is read as written, or refused with every mistake at once."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.configs.run_config import RunConfig, config_from_dict, load_config
from trellax.layers import ModelConfig
from trellax.meshes import ConfigError, MeshSpec

Golden = Callable[[str, str], None]
ROOT = Path(__file__).parents[2]

GOOD = """
[mesh]
data = 2

[model]
vocab_size = 256
num_layers = 2
hidden_size = 32
num_heads = 4

[data]
seq_len = 32

[train]
steps = 20
batch_size = 8

[optimizer]
learning_rate = 1e-2
"""

MISTAKES = {
    "unknown_key": GOOD.replace("num_heads = 4", "num_heads = 4\nnum_layer = 4"),
    "key_of_another_section": GOOD.replace("seq_len = 32", "seq_len = 32\nsteps = 4"),
    "key_like_no_other": GOOD.replace("steps = 20", "steps = 20\nqqq = 1"),
    "unknown_section": GOOD.replace("[mesh]", "[mash]"),
    "key_outside_a_section": f"batch_size = 8\n{GOOD}",
    "wrong_type": GOOD.replace("num_layers = 2", 'num_layers = "four"'),
    "text_that_looks_like_a_number": GOOD.replace("steps = 20", 'steps = "20"'),
    "fraction_for_a_whole_number": GOOD.replace("steps = 20", "steps = 20.5"),
    "true_for_a_whole_number": GOOD.replace("batch_size = 8", "batch_size = true"),
    "unknown_choice": GOOD.replace("num_heads = 4", 'num_heads = 4\nmlp = "swigloo"'),
    "no_list": GOOD.replace("seq_len = 32", 'seq_len = 32\npaths = "a.txt"'),
    "text_missing_in_a_list": GOOD.replace("seq_len = 32", "seq_len = 32\npaths = [3]"),
    "missing_key": GOOD.replace("steps = 20\n", ""),
    "missing_section": GOOD.replace("[optimizer]\nlearning_rate = 1e-2", ""),
    "section_that_is_a_number": GOOD.replace("[data]\nseq_len = 32", "").replace("[mesh]", "data = 5\n[mesh]"),
    "no_steps": GOOD.replace("steps = 20", "steps = 0"),
    "negative_learning_rate": GOOD.replace("1e-2", "-1e-2"),
    "infinite_learning_rate": GOOD.replace("1e-2", "inf"),
    "spike_ratio_below_one": GOOD.replace("batch_size = 8", "batch_size = 8\nspike_ratio = 0.5"),
    "layers_per_stage_in_words": GOOD + '\n[pipeline]\nlayers_per_stage = ["3", 3.0]\n',
    "layers_per_stage_unknown_word": GOOD + '\n[pipeline]\nlayers_per_stage = "even"\n',
    "unknown_vocab": GOOD + '\n[pipeline]\nvocab = "spilt"\n',
    "no_microbatches": GOOD + "\n[pipeline]\nmicrobatches = 0\n",
    "val_fraction_of_one": GOOD.replace("seq_len = 32", "seq_len = 32\nval_fraction = 1.0"),
    "seed_too_large": GOOD + f"\n[run]\nseed = {2**32}\n",
    "name_with_a_slash": GOOD + '\n[run]\nname = "a/b"\n',
    "mesh_without_devices": GOOD.replace("data = 2", "data = 0"),
    "mesh_with_two_open_axes": GOOD.replace("data = 2", "data = -1\npipe = -1"),
    "heads_do_not_divide_hidden": GOOD.replace("num_heads = 4", "num_heads = 5"),
    "broken_toml": GOOD.replace("steps = 20", "steps 20"),
    "unfinished_toml": GOOD + '\n[run]\nname = "a',
    "key_twice": GOOD.replace("steps = 20", "steps = 20\nsteps = 21"),
    "everything_at_once": GOOD.replace("[mesh]", "[mash]")
    .replace("num_layers = 2", 'num_layers = "four"')
    .replace("num_heads = 4", "num_head = 4")
    .replace("batch_size = 8", "batch_size = -8"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str, *, overrides: list[str] | None = None) -> str:
    Path("run.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("run.toml", overrides or [])
    return str(caught.value)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_file_is_reported_with_its_line(name: str, folder: Path, golden: Golden) -> None:
    golden(f"errors/configs/config_{name}.txt", refused(MISTAKES[name]))


def test_mistakes_in_overrides_are_reported_as_they_were_typed(folder: Path, golden: Golden) -> None:
    words = [
        "--train.steps",
        "ten",
        "--train.step=5",
        "--steps",
        "5",
        "--model.num-heads",
        "3",
        "--mesh.data",
        "0",
        "--qqq",
        "1",
        "loose",
        "--run.seed",
    ]
    golden("errors/configs/config_overrides.txt", refused(GOOD, overrides=words))


def test_missing_file_suggests_the_nearest(folder: Path, golden: Golden) -> None:
    Path("mine.toml").write_text(GOOD, encoding="utf-8")
    texts = []
    for path in ("mime.toml", "quikstart", "nowhere/at/all.toml", "."):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        texts.append(str(caught.value))
    golden("errors/configs/config_missing_file.txt", "\n".join(texts))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("[mesh]", "# é\n[mesh]").encode("latin-1"), "this is not UTF-8 text"),
        (GOOD.encode("utf-16"), "this is UTF-16 text"),
        (b"#" * 1_000_001, "has 1,000,001 bytes or more; such a file has at most 1,000,000"),
        (b"\n\n" + b"a." * 50_000 + b"a = 1", ":3: this key has too many parts"),
        (b"\n\nx = " + b"[" * 5_000, ":3: lists and tables are nested too deeply"),
        (b"\n\nx = " + b"9" * 5_000, ":3: this number has too many digits"),
    ],
)
def test_file_that_is_no_run_file_is_refused_at_its_place(content: bytes, message: str, folder: Path) -> None:
    Path("run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("run.toml")


@pytest.mark.timeout(10)
def test_endless_file_is_refused(folder: Path) -> None:
    os.mkfifo("pipe.toml")
    for path, message in (("pipe.toml", "a named pipe"), ("/dev/zero", "a device"), ("x" * 300, "File name too long")):
        with pytest.raises(ConfigError, match=message):
            load_config(path)


@pytest.mark.parametrize("encode", [lambda t: t.encode("utf-8-sig"), lambda t: t.replace("\n", "\r\n").encode()])
def test_file_from_windows_is_read(encode: Callable[[str], bytes], folder: Path) -> None:
    Path("run.toml").write_bytes(encode(GOOD))
    assert load_config("run.toml").train.steps == 20


@pytest.mark.parametrize("text", ["²", "٣", "\uff11", "9" * 5_000, "0x10", "1e400", "\udcff"])
def test_override_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--train\.steps") as caught:
        load_config("tiny-dense", [f"--train.steps={text}"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("word", ["--run.name", "--run.folder", "--data.tokenizer", "--train.init_from"])
@pytest.mark.parametrize("text", ["a\0b", "a" * 256, "/".join(["a" * 200] * 30), "caf\udce9"])
def test_text_that_names_no_file_is_refused(word: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)):
        load_config("tiny-dense", [word, text])


def test_overrides_with_an_open_quote_are_refused() -> None:
    with pytest.raises(ConfigError, match="no closing quotation"):
        load_config("tiny-dense", "--run.name 'a")


def test_number_that_is_too_large_is_refused_with_its_bound() -> None:
    with pytest.raises(ConfigError, match="at most 4096, each of which is threads and memory of this machine"):
        load_config("tiny-dense", ["--run.fake_devices", "1000000"])
    with pytest.raises(ConfigError, match="at most 2147483647, the largest whole number of 32 bits"):
        load_config("tiny-dense", ["--train.steps", "2147483648"])
    with pytest.raises(ConfigError, match="num_layers=1000000000 is too large: 10000 is the most"):
        load_config("tiny-dense", ["--model.num_layers", "1000000000"])
    with pytest.raises(ConfigError, match="mesh axis data=1000001 is larger than any machine"):
        load_config("tiny-dense", ["--mesh.data", "1000001"])


def test_mistakes_of_a_file_of_100_kb_have_no_line(folder: Path) -> None:
    assert refused(GOOD.replace("steps = 20", "steps = 0") + "#" * 100_000).startswith("run.toml: train.steps: ")


def test_file_gives_what_it_says_and_defaults_for_the_rest(folder: Path) -> None:
    Path("mine.toml").write_text(GOOD, encoding="utf-8")
    config = load_config("mine.toml")
    assert config.mesh == MeshSpec(data=2)
    assert config.model == ModelConfig(vocab_size=256, num_layers=2, hidden_size=32, num_heads=4)
    assert config.run_folder == Path("runs/mine")
    assert config.optimizer.learning_rate == 1e-2
    assert config.pipeline.schedule == "1f1b"


def test_override_wins_over_the_file(folder: Path) -> None:
    Path("mine.toml").write_text(GOOD, encoding="utf-8")
    words = [
        "--train.steps",
        "7",
        "--mesh.data=-1",
        "--data.paths",
        "a.txt,b.txt",
        "--run.name",
        "42",
        "--optimizer.learning-rate",
        "1",
    ]
    config = load_config("mine.toml", words)
    assert config.train.steps == 7
    assert config.mesh.data == -1
    assert config.data.paths == ("a.txt", "b.txt")
    assert config.run.name == "42"
    assert config.optimizer.learning_rate == 1.0


def test_last_of_two_overrides_wins() -> None:
    assert load_config("tiny-dense", ["--train.steps", "1", "--train.steps", "2"]).train.steps == 2


def test_list_override_may_be_toml() -> None:
    words = ["--data.source", "text", "--data.paths", '["a,b.txt"]']
    assert load_config("tiny-dense", words).data.paths == ("a,b.txt",)


@pytest.mark.parametrize(("text", "paths"), [("a.txt, b c.txt", ("a.txt", "b c.txt")), ("2024", ("2024",))])
def test_list_override_may_be_text_with_commas(text: str, paths: tuple[str, ...]) -> None:
    assert load_config("tiny-dense", ["--data.source", "text", "--data.paths", text]).data.paths == paths


@pytest.mark.parametrize("text", ["3,3,2", "[3,3,2]", "[3, 3, 2]", "3, 3, 2"])
def test_layers_per_stage_may_be_numbers_or_a_list(text: str) -> None:
    assert load_config("tiny-dense", ["--pipeline.layers_per_stage", text]).pipeline.layers_per_stage == (3, 3, 2)


def test_layers_per_stage_of_a_file_are_kept_or_balanced(folder: Path) -> None:
    Path("mine.toml").write_text(GOOD + "\n[pipeline]\nlayers_per_stage = [1, 1]\n", encoding="utf-8")
    assert load_config("mine.toml").pipeline.layers_per_stage == (1, 1)
    assert load_config("mine.toml", "--pipeline.layers-per-stage=2").pipeline.layers_per_stage == (2,)
    assert load_config("mine.toml", "--pipeline.layers-per-stage=auto").pipeline.layers_per_stage == "auto"
    assert load_config("tiny-dense").pipeline.layers_per_stage == "auto"


@pytest.mark.parametrize("text", ["3,x", "3,,2", "3.5", "even", "[3,[2]]"])
def test_layers_per_stage_in_words_are_reported_as_they_were_typed(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-dense", ["--pipeline.layers_per_stage", text])
    start = f"--pipeline.layers_per_stage {text}: expected 'auto' or a list of whole numbers, got ["
    assert str(caught.value).startswith(start)


def test_layers_per_stage_of_a_dict_may_be_a_tuple() -> None:
    values = {
        "model": {"vocab_size": 256, "num_layers": 5, "hidden_size": 32, "num_heads": 4},
        "data": {"seq_len": 32},
        "train": {"steps": 20, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "pipeline": {"layers_per_stage": (2, 3), "vocab": "ends"},
    }
    section = config_from_dict(values).pipeline
    assert (section.layers_per_stage, section.vocab) == ((2, 3), "ends")


@pytest.mark.parametrize("name", ["quickstart", "gpt2-124m", "llama3-8b-8gpu", "tiny-dense", "tiny-llama"])
def test_packaged_config_is_valid_and_short(name: str) -> None:
    assert isinstance(load_config(name), RunConfig)
    text = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("# ")


def test_notebooks_show_what_differs_from_the_defaults() -> None:
    html = load_config("tiny-dense", ["--data.source=text", "--data.paths=<b>.txt"])._repr_html_()
    assert '>mesh</td><td style="text-align: left"></td>' in html
    assert "vocab_size=256, num_layers=2" in html
    assert "&lt;b&gt;.txt" in html
    assert "<b>" not in html
    assert "keep=2" not in html


def test_dicts_make_the_same_config_as_a_file() -> None:
    values = {
        "run": {"name": "tiny-dense"},
        "model": {"vocab_size": 256, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_tokens": 32},
        "data": {"seq_len": 32},
        "train": {"steps": 20, "batch_size": 8, "log_every": 5, "eval_batches": 2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    }
    assert config_from_dict(values) == load_config("tiny-dense")


def test_mistakes_in_dicts_have_no_file() -> None:
    with pytest.raises(ConfigError, match=r"^model: this section is missing"):
        config_from_dict({})


def test_fake_devices_may_still_be_asked_for_after_reading() -> None:
    code = (
        "from trellax.configs.run_config import load_config\n"
        "from trellax.meshes import use_fake_devices\n"
        "import jax\n"
        "use_fake_devices(load_config('quickstart', ['--run.fake_devices', '3']).run.fake_devices)\n"
        "print(jax.device_count())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]
