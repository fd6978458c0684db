"""A batch is a function of seed and step, and an epoch covers every token."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.meshes import DataError
from trellax.train.data.batches import Batches


def make(num_tokens: int = 100, *, seed: int = 0, batch_size: int = 4, microbatches: int = 2) -> Batches:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return Batches(tokens, seq_len=8, batch_size=batch_size, microbatches=microbatches, seed=seed)


def starts(batches: Batches, *, steps: range) -> list[int]:
    return [int(start) for step in steps for start in batches[step]["tokens"][..., 0].ravel()]


def test_batch_has_microbatches_and_types() -> None:
    batch = make()[3]
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": ((2, 2, 8), "int32"),
        "targets": ((2, 2, 8), "int32"),
        "weights": ((2, 2, 8), "float32"),
    }


def test_targets_are_the_next_tokens() -> None:
    batch = make()[0]
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)


@pytest.mark.parametrize(("batch_size", "microbatches"), [(4, 1), (6, 3), (7, 7)])
def test_weights_are_equal_and_sum_to_one(batch_size: int, microbatches: int) -> None:
    weights = make(batch_size=batch_size, microbatches=microbatches)[0]["weights"]
    assert np.unique(weights).size == 1
    assert weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-7)


def test_batch_depends_on_the_step_alone() -> None:
    one, other = make(), make()
    for step in range(9):
        one[step]
    np.testing.assert_array_equal(one[9]["tokens"], other[9]["tokens"])


def test_seed_changes_the_order() -> None:
    assert starts(make(seed=0), steps=range(3)) != starts(make(seed=1), steps=range(3))


def test_microbatches_do_not_change_which_sequences_a_step_sees() -> None:
    assert starts(make(microbatches=1), steps=range(5)) == starts(make(microbatches=4), steps=range(5))


@pytest.mark.parametrize("num_tokens", [97, 98, 104, 105])
def test_epoch_predicts_every_token_after_the_first(num_tokens: int) -> None:
    batches = make(num_tokens, batch_size=1, microbatches=1)
    targets = {int(t) for step in range(batches.num_windows) for t in batches[step]["targets"].ravel()}
    assert targets == set(range(1, num_tokens))


def test_epochs_are_whole_and_shuffled_anew() -> None:
    batches = make(batch_size=1, microbatches=1)
    size = batches.num_windows
    first, second = starts(batches, steps=range(size)), starts(batches, steps=range(size, 2 * size))
    assert sorted(first) == sorted(second)
    assert first != second


def test_batches_run_on_across_epochs() -> None:
    seen = starts(make(batch_size=4), steps=range(13))
    assert len(seen) == 52
    assert {seen.count(start) for start in seen} == {4}


def test_batch_larger_than_the_corpus_repeats_it() -> None:
    assert len(starts(make(17, batch_size=8), steps=range(1))) == 8


def test_corpus_without_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="8 tokens hold no sequence of 8, which needs 9"):
        make(8)


def test_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 4 sequences does not split into 3 microbatches"):
        make(microbatches=3)


@pytest.mark.parametrize("part", [slice(None), slice(60, None)])
def test_mapped_file_is_read_and_a_truncated_one_is_an_error(part: slice, tmp_path: Path) -> None:
    file = tmp_path / "tokens.npy"
    np.save(file, np.arange(100, dtype=np.uint16))
    mapped = np.lib.format.open_memmap(file, mode="r")[part]
    sizes: Any = {"seq_len": 8, "batch_size": 4, "microbatches": 2, "seed": 0}
    batches, expected = Batches(mapped, **sizes), Batches(np.array(mapped), **sizes)
    for step in range(5):
        assert np.array_equal(batches[step]["tokens"], expected[step]["tokens"])
    os.truncate(file, 130)
    with pytest.raises(DataError, match=r"tokens\.npy: changed while the run read it: 130 bytes, not 328\."):
        batches[0]
    file.unlink()
    with pytest.raises(DataError, match="lost while the run read it"):
        batches[0]
