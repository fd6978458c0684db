"""Training on preferences: pairs are laid out, the reference is the start, runs resume and learn, mistakes are told."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.configs import RunConfig, config_from_dict
from trellax.configs.check import check_run
from trellax.hub.config import read_hub_model
from trellax.hub.tokenizer import load_tokenizer
from trellax.meshes import DataError, MeshSpec, TrellaxError
from trellax.train import evaluate, train
from trellax.train.data.preferences.pair_batches import PairBatches, PairValidation
from trellax.train.data.preferences.pairs import LoadedPairs, load_pairs
from trellax.train.metrics import read_metrics
from trellax.train.preferences.reference import reference_losses

from ...commands.test_hf_commands import here
from ...hub.chat.chats import CHATML, chat, write_tokenizer
from ..checkpoints.test_initial_weights import setup_of

__all__ = ["here"]

SIZES: dict[str, Any] = {"seq_len": 8, "batch_size": 8, "microbatches": 2}


def run_of(*, mesh: str = "data=2", name: str = "run", **sections: dict[str, Any]) -> RunConfig:
    """A run on sums, of which the right answer is chosen; one more record is too long for a row."""
    records = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1 + a % 3)}
        for a in range(6)
        for b in range(6)
    ]
    records.append({"prompt": "X" * 9, "chosen": "1", "rejected": "2"})
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name},
        "mesh": MeshSpec.parse(mesh).sizes,
        "model": {**vars(read_hub_model(Path("model")).config), "dtype": "float32", "lora_rank": 2},
        "data": {"source": "pairs", "paths": ["pairs.jsonl"], "tokenizer": "model", "seq_len": 8},
        "train": {"steps": 2, "batch_size": 8, "init_from": "model", "log_every": 1},
        "optimizer": {"learning_rate": 0.05, "min_lr_ratio": 1.0},
        "pipeline": {"microbatches": 2},
    }
    for section, keys in sections.items():
        values.setdefault(section, {}).update(keys)
    return config_from_dict(values)


def table_of(records: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(records)


def pairs_of(config: RunConfig) -> LoadedPairs:
    return load_pairs(config.data)


def test_rows_count_the_tokens_of_the_answer_alone(here: Path) -> None:
    loaded = pairs_of(run_of())
    assert (len(loaded.pairs), loaded.num_held_out) == (36, 2)
    assert "1 longer than data.seq_len left out" in loaded.description
    tokens, targets, counts = loaded.pairs.row(1, seq_len=8)
    end = loaded.pairs.tokens[loaded.pairs.starts[1] - 1]
    # 0+0= and its rejected answer 1; letters are numbered from the space on.
    assert tokens.tolist() == [16, 11, 16, 29, 17, 0, 0, 0]
    assert targets.tolist() == [11, 16, 29, 17, end, 0, 0, 0]
    assert counts.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


CHATS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": chat("2 + 2?"), "chosen": chat("", "4")[1:], "rejected": chat("", "5")[1:]},
    "text": {"prompt": "2 + 2?", "chosen": chat("", "4")[1:], "rejected": chat("", "5")[1:]},
    "whole": {"chosen": chat("2 + 2?", "4"), "rejected": chat("2 + 2?", "5")},
    "both": {"prompt": chat("2 + 2?"), "chosen": chat("2 + 2?", "4"), "rejected": chat("2 + 2?", "5")},
    "text and whole": {"prompt": "2 + 2?", "chosen": chat("2 + 2?", "4"), "rejected": chat("2 + 2?", "5")},
}


def chat_pairs(file: str, **data: Any) -> LoadedPairs:
    values: dict[str, Any] = {"source": "pairs", "paths": [file], "tokenizer": "chats", "seq_len": 64, **data}
    return pairs_of(run_of(data=values))


@pytest.mark.parametrize("form", CHATS)
@pytest.mark.parametrize("kind", ["lines", "parquet"])
def test_messages_are_read_in_every_form(form: str, kind: str, here: Path) -> None:
    write_tokenizer(Path("chats"), template=CHATML)
    if kind == "lines":
        Path("chats.jsonl").write_text(json.dumps(CHATS[form]) + "\n" + json.dumps(CHATS["prompt"]))
    else:
        pytest.importorskip("pyarrow.parquet").write_table(table_of([CHATS[form]] * 2), "chats.parquet")
    loaded = chat_pairs("chats.jsonl" if kind == "lines" else "chats.parquet")
    tokenizer = load_tokenizer("chats").tokenizer
    rows = [loaded.pairs.row(row, seq_len=64) for row in range(4)]
    texts = [tokenizer.decode(targets[counts > 0].tolist(), skip_special_tokens=False) for _, targets, counts in rows]
    assert texts == ["4<|im_end|>\n", "5<|im_end|>\n"] * 2
    assert all((rows[0][part] == rows[2][part]).all() for part in range(3))


def test_messages_without_a_template_are_refused(here: Path) -> None:
    write_tokenizer(Path("chats"), template=None)
    Path("chats.jsonl").write_text(json.dumps(CHATS["whole"]))
    with pytest.raises(DataError, match="chats has no chat template"):
        chat_pairs("chats.jsonl")
    with pytest.raises(DataError, match=r"data\.tokenizer='bytes' has none"):
        chat_pairs("chats.jsonl", tokenizer="bytes")


def test_batches_hold_each_pair_once_an_epoch_side_by_side(here: Path) -> None:
    loaded = pairs_of(run_of())
    reference = np.arange(loaded.pairs.num_rows, dtype=np.float32)
    batches = PairBatches(loaded.pairs, numbers=range(34), reference=reference, **SIZES, seed=3)
    rows = np.concatenate([batches[step]["reference"].reshape(-1) for step in range(9)])[: 2 * 34]
    assert sorted(rows) == list(range(68))
    assert (rows[1::2] == rows[::2] + 1).all()
    assert batches[0]["shares"].sum() == 2
    held_out = PairValidation(loaded.pairs, numbers=[34, 35], reference=reference, **SIZES, max_batches=5)
    assert len(held_out) == 1
    assert held_out[0]["shares"].sum() == 2
    assert set(held_out[0]["reference"][held_out[0]["shares"] > 0]) == {68, 69, 70, 71}


def test_run_starts_at_its_reference_and_resumes_on_another_mesh(here: Path) -> None:
    for name, steps, mesh in (("one", 4, "data=8"), ("cut", 2, "data=8"), ("cut", 4, "data=2,tensor=2,pipe=2")):
        train(run_of(name=name, mesh=mesh, train={"steps": steps, "batch_size": 32}), changes="accept")
    lines = [line for line in read_metrics("runs/one") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["reward_margin"] > 0.01
    assert 0 <= lines[-1]["reward_accuracy"] <= 1
    losses = [read_metrics(f"runs/{name}")[-1]["val_loss"] for name in ("one", "cut")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert evaluate("runs/one") == pytest.approx(losses[0], rel=1e-6)
    # The reference was computed once: it is kept.
    assert len(list(Path("runs/cut/tokens").glob("reference-*.npy"))) == 1


def test_reference_is_the_loss_of_the_first_weights_on_any_mesh(here: Path) -> None:
    found = []
    for mesh in ("data=1", "data=2,tensor=2,pipe=2"):
        config = run_of(mesh=mesh)
        found.append(reference_losses(setup_of(config), pairs_of(config), cache=None))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[0].shape == (72,)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"init_from": ""}}, "train.init_from is empty"),
        ({"train": {"batch_size": 4}}, "is 1 rows for each microbatch and data shard, of 2 x 2"),
        ({"data": {"packing": "on"}}, "data.packing=on with data.source='pairs'"),
        ({"train": {"z_loss": 1e-4}}, "train.z_loss=0.0001 with data.source='pairs'"),
        ({"data": {"paths": []}}, "data.paths is empty"),
    ],
)
def test_keys_that_do_not_fit_are_refused(here: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(TrellaxError, match=message):
        check_run(run_of(**sections), num_devices=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "A", "chosen": "B", "rejcted": "C"}', "no field 'rejected'"),
        ('{"prompt": "A", "chosen": "", "rejected": "C"}', "an answer is empty"),
        ('{"prompt": "A", "chosen": ["B"], "rejected": "C"}', "chosen: no text"),
        ('{"chosen": "B", "rejected": "C"}', "no prompt, which answers that are text need"),
        ('{"chosen": [], "rejected": ["C"]}', "an answer is empty"),
        ('{"prompt": 3, "chosen": ["B"], "rejected": ["C"]}', "prompt: no text and no list of messages"),
        ('{"prompt": "A", "chosen": ["B"], "rejected": ["C"]}', "chosen or rejected is not the assistant's"),
        ('{"chosen": ["A", "B"], "rejected": ["D", "C"]}', "differ in more than their last message"),
        ('{"prompt": ["D"], "chosen": ["A", "B"], "rejected": ["A", "C"]}', "are not those of prompt"),
        ('{"prompt": "D", "chosen": ["A", "B"], "rejected": ["A", "C"]}', "prompt is none of the messages"),
        ('{"prompt": "A", "chosen": "B", "rejected": "C"}', "1 are left, and two are needed"),
    ],
)
def test_records_that_are_no_pairs_are_refused(here: Path, text: str, message: str) -> None:
    config = run_of()
    Path("pairs.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        pairs_of(config)
