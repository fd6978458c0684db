"""Shards stay in their files; a blend has its shares, and loses and repeats nothing however a run is resumed."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.configs import load_config
from trellax.configs.check import check_run
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError, TrellaxError
from trellax.train import train
from trellax.train.data.batches import Batches, TokenSource
from trellax.train.data.corpus import load_corpus
from trellax.train.data.joined_tokens import JoinedTokens
from trellax.train.data.validation_batches import ValidationBatches


def load(*paths: str, **values: Any) -> Any:
    section = {"source": "tokens", "seq_len": 8, "val_fraction": 0.25, "paths": paths} | values
    return load_corpus(DataSection.model_validate(section))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 60), st.integers(0, 99))
def test_joined_tokens_read_as_one_array(sizes: list[int], start: int, stop: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 99, size).astype(rng.choice(["uint16", "uint32"])) for size in sizes]
    joined, whole = JoinedTokens(parts), np.concatenate(parts)
    assert (joined.size, np.asarray(joined).tolist()) == (whole.size, whole.tolist())
    view = joined[start:stop]
    assert np.asarray(view).tolist() == whole[start:stop].tolist()
    assert view.read(3, 9).tolist() == whole[start:stop][3:12].tolist()


def test_many_shards_stay_in_their_files_and_give_the_batches_of_one(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 60_000, 4_000).astype(np.uint16)
    np.save("whole.npy", ids)
    for i, part in enumerate(np.split(ids, range(3, 4_000, 16))):
        np.save(f"shard-{i:03}.npy", part)
    many, one = load("shard-*.npy"), load("whole.npy")
    assert all(isinstance(part, np.memmap) for part in (*many.train.parts, *many.validation.parts))
    assert (many.sha256, many.vocab_size_needed) == (one.sha256, one.vocab_size_needed)
    sizes: Any = {"seq_len": 8, "batch_size": 4, "microbatches": 2}
    for step in range(9):
        first, second = (Batches(own.train, **sizes, seed=1)[step]["tokens"] for own in (many, one))
        assert np.array_equal(first, second)
    first, second = (ValidationBatches(own.validation, **sizes, max_batches=3)[2] for own in (many, one))
    assert np.array_equal(first["targets"], second["targets"])


def test_shard_that_changes_during_a_run_is_noticed(folder: Path) -> None:
    for i in range(3):
        np.save(f"{i}.npy", np.arange(40, dtype=np.uint16))
    corpus = load("?.npy")
    corpus.check_files()
    np.save("1.npy", np.arange(1, 41, dtype=np.uint16))
    with pytest.raises(DataError, match=r"1\.npy: changed while the run read it"):
        corpus.check_files()


def test_shards_of_two_types_keep_all_ids(folder: Path) -> None:
    np.save("a.npy", np.arange(70_000, 70_050, dtype=np.uint64))
    np.save("b.npy", np.arange(50, dtype=np.int8))
    assert np.asarray(load("?.npy").train)[[0, 50]].tolist() == [70_000, 0]


def sources(*sizes: int, weights: tuple[float, ...]) -> tuple[TokenSource, ...]:
    """Return sources whose tokens say where they come from: 1,000 x the source + the place."""
    pairs = zip(sizes, weights, strict=True)
    return tuple(
        TokenSource(tokens=1_000 * i + np.arange(size), weight=weight) for i, (size, weight) in enumerate(pairs)
    )


def starts(batches: Batches, steps: range) -> list[int]:
    return [int(start) for step in steps for start in batches[step]["tokens"][..., 0].ravel()]


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(9, 90), st.integers(9, 90), st.integers(9, 90)),
    st.tuples(*[st.floats(0.1, 9)] * 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=2, max_size=4),
)
def test_resumed_blend_loses_and_repeats_nothing(
    sizes: tuple[int, ...], weights: tuple[float, ...], legs: list[tuple[int, int]]
) -> None:
    """A leg is a run with a batch size, resumed after some steps with the next; all see the sequences of one run."""
    blend = sources(*sizes, weights=weights)
    seen: list[int] = []
    step = 0
    for batch_size, steps in legs:
        first = len(seen) - step * batch_size
        own = Batches(blend, seq_len=8, batch_size=batch_size, microbatches=1, seed=3, first_sequence=first)
        seen += starts(own, range(step, step + steps))
        step += steps
    one = Batches(blend, seq_len=8, batch_size=1, microbatches=1, seed=3)
    assert seen == starts(one, range(len(seen)))


@pytest.mark.slow
def test_run_of_a_blend_resumes_on_another_data_size(folder: Path, tiny: Callable[..., Any]) -> None:
    """A run of 12 steps, and one cut within epochs after 5 and 8, on data sizes of 2, 4 and 8, have the same losses."""
    for i, size in enumerate((300, 500, 170)):
        np.save(f"{i}.npy", np.random.default_rng(i).integers(0, 256, size).astype(np.uint8))
    words = "--data.source tokens --data.paths 0.npy,1.npy,2.npy --data.weights 1,3,0.7 --data.seq_len 16"
    words += (
        " --data.val_fraction 0.2 --train.batch_size 8 --train.log_every 1 --optimizer.lr_schedule constant --run.name"
    )
    train(tiny(f"{words} whole --train.steps 12 --mesh.tensor 4 --mesh.pipe 2"))
    for steps, data in ((5, 2), (8, 4), (12, 8)):
        mesh = f"--mesh.data {data} --mesh.tensor {8 // data}"
        train(tiny(f"{words} parts --train.steps {steps} {mesh}"), changes="accept")
    whole, parts = (read_losses(folder / "runs" / name) for name in ("whole", "parts"))
    assert list(whole) == list(parts) == list(range(1, 13))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=2e-5)
    assert len(set(whole.values())) == 12


def read_losses(run: Path) -> dict[int, float]:
    """Return the training loss of each step of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_blend_has_its_shares_and_each_source_whole_epochs() -> None:
    blend = sources(81, 161, weights=(1.0, 3.0))
    batches = Batches(blend, seq_len=8, batch_size=4, microbatches=2, seed=0)
    seen = starts(batches, range(20))
    assert Counter(start // 1_000 for start in seen) == {0: 20, 1: 60}
    # 10 windows and 20 windows.
    assert set(Counter(start for start in seen if start < 1_000).values()) == {2}
    assert set(Counter(start for start in seen if start >= 1_000).values()) == {3}
    assert all(abs(Counter(s // 1_000 for s in seen[:n])[0] - n / 4) <= 1 for n in range(80))
    assert batches.num_windows == 26


def test_blend_of_a_config_holds_out_a_part_of_each_path(folder: Path) -> None:
    np.save("a.npy", np.arange(100, dtype=np.uint16))
    np.save("b.npy", 1_000 + np.arange(400, dtype=np.uint16))
    corpus = load("a.npy", "b.npy", weights=(1, 1))
    assert [(part.train.size, part.validation.size) for part, _ in corpus.blend] == [(75, 25), (300, 100)]
    assert corpus.description.startswith("a blend of 50.0% tokens of 1 array, 100 tokens, 25 held out; 50.0% ")
    validation = ValidationBatches(corpus.validation_sources, seq_len=8, batch_size=2, microbatches=1, max_batches=9)
    # Three windows of each: then the first source would repeat.
    assert validation.num_sequences == 6
    assert corpus.sha256 != load("b.npy", "a.npy", weights=(1, 1)).sha256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.weights 1", r"data\.weights has 1 numbers, and data\.paths has 2 paths"),
        ("--data.weights=1,0", r"data\.weights has 0; a weight is above 0"),
        ("--data.weights=1,x", "x"),
    ],
)
def test_blend_that_fits_no_paths_is_refused(words: str, message: str) -> None:
    with pytest.raises(TrellaxError, match=message):
        check_run(load_config("tiny-llama", f"--data.source tokens --data.paths a.npy,b.npy {words}"), num_devices=8)


def test_file_in_two_paths_of_a_blend_is_refused(folder: Path) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(name, np.arange(100, dtype=np.uint16))
    with pytest.raises(DataError, match=r"a\.npy is of two paths of the blend, '\*\.npy' and 'a\.npy'"):
        load("*.npy", "a.npy", weights=(1, 2))
