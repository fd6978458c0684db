"""`trellax generate`: text on stdout, talk on stderr, the same on any mesh, and mistakes before weights are read."""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.commands.cli import main
from trellax.commands.generate import _engine_sizes, _logprob_lines, _Printer, _read_prompts
from trellax.commands.generation.answer_text import AnswerText
from trellax.configs import load_config
from trellax.hub.saves.reader import SaveReader
from trellax.hub.special_ids import ORIGIN
from trellax.hub.text_stream import ByteTokenizer
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import Completion, Engine, Request, ServedSequence, TokenLogprobs, load_for_serving, param_shapes
from trellax.train.checkpoints.initial_weights import save_params

PROMPTS = ["def f(", "é = 1", "x"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama with drawn weights, as `trellax train` saves it."""
    config = load_config("tiny-llama")
    rng = np.random.default_rng(0)
    shapes = param_shapes(config.model, mesh=build_mesh(MeshSpec(), devices=jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype("float32")), shapes)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_params(folder, params, config)
    return folder


@pytest.fixture
def ask(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command on the run folder; exit code, stdout and stderr."""

    def run(*words: str, folder: str | Path = run_folder) -> tuple[int, str, str]:
        code = main(["generate", str(folder), *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


HOW = ["--max-new-tokens", "8", "--temperature", "0.9", "--seed", "5"]
HOW += [word for prompt in PROMPTS for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def answers(run_folder: Path) -> list[Completion]:
    """What `HOW` must give, by the Python side of it on one device."""
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    source, params = load_for_serving(run_folder, mesh=mesh)
    engine = Engine(source.config, params, mesh=mesh, slots=1, max_tokens=16)
    tokens = [tuple(source.tokenizer.encode(prompt)) for prompt in PROMPTS]
    return engine.generate(
        Request(prompt=prompt, max_new_tokens=8, temperature=0.9, seed=5 + i) for i, prompt in enumerate(tokens)
    )


def test_json_has_prompt_completion_and_tokens_the_same_on_any_mesh(ask: Any, answers: list[Completion]) -> None:
    code, out, err = ask(*HOW, "--json", "--mesh", "tensor=2,pipe=2", "--fake-devices", "8", "--chunk", "2")
    assert code == 0
    assert "tokens/s" in err
    assert json.loads(out) == [
        {
            "prompt": prompt,
            "completion": ByteTokenizer().decode(answer.tokens),
            "token_ids": list(answer.tokens),
            "finish_reason": "length",
        }
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]


def test_terminal_shows_prompts_with_their_answers_in_order(
    ask: Any, answers: list[Completion], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]) + "\n", encoding="utf-8")
    words = [*HOW[:6], "--prompt", PROMPTS[0], "--prompts-file", str(tmp_path / "prompts.txt"), "--slots", "2"]
    code, out, _ = ask(*words)
    assert code == 0
    texts = [ByteTokenizer().decode(answer.tokens) for answer in answers]
    assert out == "\n---\n".join(f"{prompt}{text}" for prompt, text in zip(PROMPTS, texts, strict=True)) + "\n"


def test_model_and_parameters_are_of_the_type_that_is_asked_for(run_folder: Path) -> None:
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    source, params = load_for_serving(run_folder, mesh=mesh, dtype="bfloat16")
    assert {source.config.dtype, *(leaf.dtype.name for leaf in jax.tree.leaves(params))} == {"bfloat16"}


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(ask: Any, answers: list[Completion]) -> None:
    tokens = [list(answer.tokens) for answer in answers]
    stop = next(token for token in tokens[0] + tokens[1] + tokens[2] if token < 128)
    found = json.loads(ask(*HOW, "--json", "--stop", chr(stop))[1])
    wanted = [own[: own.index(stop)] if stop in own else own for own in tokens]
    assert [one["token_ids"] for one in found] == wanted
    assert [one["finish_reason"] for one in found] == ["stop" if stop in own else "length" for own in tokens]


@pytest.mark.slow
def test_a_stop_of_several_tokens_ends_an_answer_in_its_text(ask: Any, answers: list[Completion]) -> None:
    texts = [ByteTokenizer().decode(answer.tokens) for answer in answers]
    stop = next("".join(pair) for text in texts for pair in pairwise(text) if "".join(pair).isalnum())
    code, out, _ = ask(*HOW, "--json", "--stop", stop)
    assert code == 0
    found = json.loads(out)
    assert [one["completion"] for one in found] == [text.partition(stop)[0] for text in texts]
    assert [one["finish_reason"] for one in found] == ["stop" if stop in text else "length" for text in texts]
    # Ids are those up to the end of the stop, and no token that the engine was ahead.
    for one, answer in zip(found, answers, strict=True):
        ids = one["token_ids"]
        assert ids == list(answer.tokens[: len(ids)])
        assert one["finish_reason"] == "length" or ByteTokenizer().decode(ids).endswith(stop)
    assert stop in "".join(texts)


@pytest.mark.slow
def test_settings_that_change_logits_reach_the_answer_and_log_probabilities_are_shown(ask: Any) -> None:
    """A bias wins over all else, and its penalty for each time over the bias: 65 three times, then 66."""
    words = ["--prompt", "x", "--max-new-tokens", "4", "--logit-bias", "65=100", "--logit-bias", "66=95"]
    words += ["--frequency-penalty", "2", "--presence-penalty", "0.5", "--repetition-penalty", "1", "--min-p", "0.1"]
    code, out, _ = ask(*words, "--logprobs", "2", "--json")
    (found,) = json.loads(out)
    assert (code, found["token_ids"]) == (0, [65, 65, 65, 66])
    assert [one["token"] for one in found["logprobs"]] == [65, 65, 65, 66]
    assert [len(one["top"]) for one in found["logprobs"]] == [2, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lookup", "model"])
def test_guesses_change_no_answer_and_their_share_is_told(
    how: str, ask: Any, answers: list[Completion], run_folder: Path
) -> None:
    code, out, err = ask(*HOW, "--json", "--speculate", str(run_folder) if how == "model" else how)
    assert code == 0
    assert [one["token_ids"] for one in json.loads(out)] == [list(answer.tokens) for answer in answers]
    # The model guesses what it says itself.
    assert ("100% of" in err) == (how == "model")
    assert ("guessed tokens were right" in err) or how == "lookup"


@pytest.mark.slow
def test_quantized_answers_are_those_of_python_and_the_error_is_told(ask: Any, run_folder: Path) -> None:
    code, out, err = ask(*HOW, "--json", "--weights", "int8", "--cache-dtype", "fp8")
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    source, params = load_for_serving(run_folder, mesh=mesh, weights="int8")
    engine = Engine(source.config, params, mesh=mesh, slots=1, max_tokens=16, cache_dtype="fp8")
    requests = [
        Request(prompt=tuple(source.tokenizer.encode(prompt)), max_new_tokens=8, temperature=0.9, seed=5 + i)
        for i, prompt in enumerate(PROMPTS)
    ]
    wanted = [list(answer.tokens) for answer in engine.generate(requests)]
    assert (code, [one["token_ids"] for one in json.loads(out)]) == (0, wanted)
    assert "weights   int8, a scale for each output channel: rounded by 0." in err
    assert "fp8, a scale for each token and head" in err


@pytest.mark.slow
def test_answers_keep_to_a_schema_or_an_expression(ask: Any, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs the extra constrain")
    code, out, _ = ask(*HOW, "--json", "--regex", "[a-c]{3,5}")
    assert (code, [bool(re.fullmatch("[a-c]{3,5}", one["completion"])) for one in json.loads(out)]) == (0, [True] * 3)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["a"],
    }
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    (tmp_path / "a.json").write_text(json.dumps(schema))
    words = ["--prompt", "x", "--temperature", "1", "--mesh", "tensor=2,pipe=2", "--max-new-tokens", "20", "--json"]
    code, out, _ = ask(*words, "--json-schema", str(tmp_path / "a.json"))
    (found,) = json.loads(out)
    assert (code, found["finish_reason"], list(json.loads(found["completion"]))) == (0, "stop", ["a"])
    code, out, err = ask("--prompt", "x", "--regex", "(")
    assert (code, out) == (2, "")
    assert "the regular expression is not supported" in err


def test_each_token_has_a_line_of_log_probabilities() -> None:
    sequence = ServedSequence(id=0, request=Request(prompt=(1,)))
    sequence.logprobs = [TokenLogprobs(token=65, logprob=-1.5, top=((66, -0.5), (65, -1.5)))]
    answer = AnswerText(ByteTokenizer(), sequence.request)
    lines = list(_logprob_lines([sequence], [answer], ByteTokenizer()))
    assert lines == ["logprobs of answer 0", "  -1.500     65 'A'   | -0.500     66 'B'   | -1.500     65 'A'"]


MISTAKES: dict[str, list[str]] = {
    "no_prompt": [],
    "prompt_longer_than_the_model": ["--prompt", "x" * 40],
    "prompt_longer_than_the_cache": ["--prompt", "x" * 10, "--max-new-tokens", "4", "--max-tokens", "12"],
    "heads_over_tensor": ["--prompt", "x", "--mesh", "tensor=3", "--max-new-tokens", "4"],
    "layers_over_pipe": ["--prompt", "x", "--mesh", "pipe=4", "--max-new-tokens", "4"],
    "slots_over_groups": ["--prompt", "x", "--mesh", "pipe=2", "--slots", "3", "--max-new-tokens", "4"],
    "mesh_too_large": ["--prompt", "x", "--mesh", "tensor=4,data=4", "--max-new-tokens", "4"],
    "unknown_type": ["--prompt", "x", "--dtype", "bfloat6"],
    "unknown_weights": ["--prompt", "x", "--weights", "int4"],
    "system_without_chat": ["--prompt", "x", "--system", "Be brief."],
    "chat_without_template": ["--chat", "--prompt", "x"],
    "unknown_axis": ["--prompt", "x", "--mesh", "tenso=2"],
    "prompt_that_is_no_text": ["--prompt", "x\udcff"],
    "stop_that_is_no_text": ["--prompt", "x", "--stop", "\udcff"],
    "bias_that_is_no_pair": ["--prompt", "x", "--logit-bias", "7"],
    "penalty_out_of_range": ["--prompt", "x", "--presence-penalty", "3"],
    "no_guesses": ["--prompt", "x", "--max-new-tokens", "4", "--speculate", "lookup", "--speculate-tokens", "0"],
    "no_draft": ["--prompt", "x", "--max-new-tokens", "4", "--speculate", "no-folder"],
    "two_forms": ["--prompt", "x", "--regex", "a", "--json-schema", "no-file"],
    "no_schema": ["--prompt", "x", "--json-schema", "no-file"],
    "override": ["--prompt", "x", "--train.steps", "3"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_before_weights_are_read(
    name: str, ask: Any, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveReader, "read", lambda *args: pytest.fail("read"))
    code, out, err = ask(*MISTAKES[name])
    assert (code, out) == (2, "")
    golden(f"errors/commands/generate_{name}.txt", err)


def test_engine_looks_for_all_ends_of_a_model() -> None:
    args = Namespace(groups=0, slots=0, max_tokens=0, chunk=4, cache_dtype=None)
    model = load_config("tiny-llama").model
    for stops, wanted in ((1, 8), (9, 9)):
        request = Request(prompt=(1,), stop=tuple(range(stops)))
        assert _engine_sizes(args, model, [request], MeshSpec())["max_stops"] == wanted


def test_letters_that_stdout_lacks_are_escaped() -> None:
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    printer = _Printer(ByteTokenizer(), ["é "], [Request(prompt=(1,))], out)
    for token in "ü".encode():
        printer.add(ServedSequence(id=0, request=Request(prompt=(1,))), token)
    assert out.buffer.getvalue() == rb"\xe9 \xfc"


class Terminal(TextIOWrapper):
    """A stdout that says it is one."""

    def isatty(self) -> bool:
        """Return yes."""
        return True


@pytest.mark.parametrize(("kind", "shown"), [(Terminal, rb"\x1b[2J\r" + b"\t\n" + rb"\x9b!"), (TextIOWrapper, None)])
def test_control_characters_are_escaped_on_a_terminal_and_raw_in_a_pipe(kind: Any, shown: bytes | None) -> None:
    text = "\x1b[2J\r\t\n\x9b!"
    out = kind(BytesIO(), encoding="utf-8")
    printer = _Printer(ByteTokenizer(), [""], [Request(prompt=(1,))], out)
    for token in text.encode():
        printer.add(ServedSequence(id=0, request=Request(prompt=(1,))), token)
    assert out.buffer.getvalue() == (text.encode() if shown is None else shown)


def test_each_line_of_the_prompts_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\x0cb\u2028c\r\n\n d\n".encode())
    assert _read_prompts(Namespace(prompt=[], stop=[], prompts_file=str(file), system=None)) == ["a\x0cb\u2028c", " d"]


def test_imported_run_without_its_tokenizer_is_not_served_as_bytes(
    run_folder: Path, ask: Any, tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, "tiny")
    Path("tiny", ORIGIN).write_text("{}")
    code, out, err = ask("--prompt", "x", folder="tiny")
    assert (code, out) == (2, "")
    golden("errors/commands/generate_no_tokenizer.txt", err)


def test_folders_without_a_model_are_reported(
    ask: Any, golden: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    errors = [ask("--prompt", "x", folder=folder) for folder in ("nowhere", "empty")]
    assert [code for code, _, _ in errors] == [2, 2]
    golden("errors/commands/generate_no_model.txt", "".join(err for _, _, err in errors))
