"""Scores of lm-evaluation-harness are those of its own Hugging Face back end, on any mesh."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trellax.commands.cli import main
from trellax.meshes import DataError, MeshSpec

from ...hub.hub import GOLDEN
from ..crafted import add_tokenizer

TASKS = {
    "choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "rolling": """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
    "until": """
task: tiny_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["5", "7"], max_gen_toks: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}
LETTERS = "".join(chr(32 + number) for number in range(2, 64))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw = np.random.default_rng(0)

    def text(count: int) -> str:
        return "".join(draw.choice(list(LETTERS), count))

    rows = [
        {"question": text(6), "choices": [" " + text(1 + i % 3), " " + text(2), text(4)], "answer": i % 3}
        for i in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": text(count)} for count in (5, 70, 130)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, source in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(source.format(folder=tmp_path))
    return tmp_path


def copy_model(name: str, folder: Path) -> Path:
    shutil.copytree(GOLDEN / name, model := folder / name)
    add_tokenizer(model)
    (model / "chat_template.jinja").unlink()
    # As HFLM knows no other name for the length.
    (model / "tokenizer_config.json").write_text(
        '{"eos_token": "\\"", "bos_token": "!", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return model


def requests_of(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=own) for own in args]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"), [("llama3", "data=1"), ("qwen3", "data=2,tensor=2,pipe=2"), ("gpt2", "tensor=2,pipe=2")]
)
def test_answers_are_those_of_the_harness_own_back_end(name: str, mesh: str, folder: Path) -> None:
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from trellax.commands.harness.harness_model import HarnessModel

    path = copy_model(name, folder)
    ours = HarnessModel(path, mesh=MeshSpec.parse(mesh), batch_size=4, dtype="float32", max_length=64)
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4, max_length=64)
    pairs = requests_of(("Q: 1 A:", " 3"), ("", "ABC"), ("AB ", "C"), ("!AB", "CD"), ("A" * 90, "BCD"), ("A", "A" * 60))
    for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one == pytest.approx(other, abs=3e-4)
    texts = requests_of(("ABC",), ("A 1" * 50,), ("",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=2e-3)
    prompts = requests_of(
        ("Q: 1 A:", {"until": ["5"], "max_gen_toks": 12}),
        ("A" * 70, {"until": [], "max_gen_toks": 9}),
        ("!AB", {"max_gen_toks": 5, "do_sample": False}),
    )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.slow
def test_scores_of_tasks_are_those_of_the_harness_own_back_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from trellax.commands.harness.run_tasks import run_tasks

    path, files = copy_model("llama3", folder), [str(folder / f"{name}.yaml") for name in TASKS]
    ours = run_tasks(path, files, mesh=MeshSpec.parse("data=2,pipe=2"), batch_size=4, max_length=64)
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(path), device="cpu", dtype="float32", max_length=64),
        tasks=[load_yaml(file, resolve_func=True) for file in files],
        bootstrap_iters=1000,
    )["results"]
    assert set(ours) == {"tiny_choice", "tiny_rolling", "tiny_until"}
    for task, wanted in theirs.items():
        numbers = {name: value for name, value in wanted.items() if isinstance(value, int | float)}
        assert {name: ours[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    capsys.readouterr()
    words = ["eval", str(path), "--tasks", files[0], "--seq-len", "64", "--limit", "3", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["tiny_choice"]["sample_len"] == 3
    assert main(words[:-1]) == 0
    assert "tiny_choice  acc" in capsys.readouterr().out


@pytest.mark.slow
def test_mistakes_are_told(folder: Path) -> None:
    from trellax.commands.harness.run_tasks import run_tasks

    path = copy_model("llama3", folder)
    (folder / "broken.yaml").write_text("task: [")
    for task, message in {
        "lambada_opena": "has no task 'lambada_opena'. Did you mean 'lambada_openai'",
        "no.yaml": "no.yaml: there is no such file",
        str(folder / "broken.yaml"): "broken.yaml is no task",
    }.items():
        with pytest.raises(DataError, match=message.replace(".", r"\.")):
            run_tasks(path, [task])
    with pytest.raises(DataError, match="max_length=9999 is longer than the model reads"):
        run_tasks(path, [str(folder / "choice.yaml")], max_length=9999)
