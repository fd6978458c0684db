"""Where documents end, and that a packed sequence counts, positions and weighs its tokens by document."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from trellax.configs.sections import DataSection
from trellax.meshes import DataError
from trellax.train.data.batches import Batches
from trellax.train.data.corpus import load_corpus
from trellax.train.data.documents import Documents, pack
from trellax.train.data.validation_batches import ValidationBatches

END = 0
LENGTHS = [3, 9, 1, 1, 30, 7, 20, 2, 4, 11, 6, 5]


def corpus() -> np.ndarray:
    """Documents of these lengths, each of its own number but for the last token, the end id."""
    return np.concatenate([[*[number + 1] * (length - 1), END] for number, length in enumerate(LENGTHS)]).astype(
        "uint16"
    )


def sizes(**more: Any) -> dict[str, Any]:
    return {"seq_len": 8, "batch_size": 4, "microbatches": 2, "seed": 3} | more


def test_ends_by_id_and_by_place_are_the_same() -> None:
    tokens, places = corpus(), Documents(ends=np.cumsum(LENGTHS) - 1)
    for start in (0, 1, 5, 40, 90):
        part = tokens[start : start + 9]
        found = places.is_last(part, start=start)
        np.testing.assert_array_equal(found, Documents(end_id=END).is_last(part, start=start))
        np.testing.assert_array_equal(found, places.behind(start).is_last(part, start=0))


def test_segments_positions_and_weights_of_a_sequence() -> None:
    packed = pack(np.array([[0, 0, 1, 1, 0, 0, 0, 1], [0] * 8], bool))
    assert packed.segments.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0] * 8]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], list(range(8))]
    assert packed.predicts.tolist() == [[True, True, False, False, True, True, True, False], [True] * 8]


def test_batches_have_places_and_predict_within_documents_alone() -> None:
    batches = Batches(corpus(), **sizes(), documents=Documents(end_id=END))
    for step in range(6):
        batch = batches[step]
        tokens, targets, weights = (batch[name] for name in ("tokens", "targets", "weights"))
        assert weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)
        np.testing.assert_array_equal(weights == 0, tokens == END)
        # Within a document all tokens but the last are its number.
        inside = (weights > 0) & (targets != END)
        np.testing.assert_array_equal(targets[inside], tokens[inside])
        starts = batch["positions"] == 0
        np.testing.assert_array_equal(starts[..., 1:], np.diff(batch["segments"], axis=-1) == 1)
        np.testing.assert_array_equal(starts[..., 1:], tokens[..., :-1] == END)


def test_packing_changes_no_token_and_no_order() -> None:
    plain, packed = Batches(corpus(), **sizes()), Batches(corpus(), **sizes(), documents=Documents(end_id=END))
    assert set(packed[0]) - set(plain[0]) == {"segments", "positions"}
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(plain[5][name], packed[5][name])


def test_validation_weighs_all_tokens_that_count_alike() -> None:
    own = {name: value for name, value in sizes().items() if name != "seed"}
    batches = ValidationBatches(corpus(), **own, max_batches=9, documents=Documents(end_id=END))
    weights = [batches[index]["weights"] for index in range(len(batches))]
    assert sum(part.sum(dtype=np.float64) for part in weights) == pytest.approx(1, rel=1e-6)
    assert np.unique(np.concatenate([part[part > 0] for part in weights])).size == 1
    assert len({part.shape for part in weights}) == 1


def test_each_text_file_is_a_document_and_the_held_out_part_keeps_its_ends(tmp_path: Path) -> None:
    for number, text in enumerate(("first\n", "second", "third and longest of all\n")):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = tuple(str(tmp_path / f"{number}.txt") for number in range(3))
    section: dict[str, Any] = {"source": "text", "paths": paths, "seq_len": 4, "val_fraction": 0.7}
    found = load_corpus(DataSection(**section, packing="on"))
    assert found.documents is not None
    assert found.documents.ends is not None
    whole = b"first\nsecond\nthird and longest of all\n"
    assert [whole[end : end + 1] for end in found.documents.ends] == [b"\n"] * 3
    held = found.documents.behind(found.train.size)
    assert held.ends is not None
    assert [int(np.asarray(found.validation)[end]) for end in held.ends] == [10, 10]
    assert load_corpus(DataSection(**section)).documents is None


def test_arrays_end_documents_with_the_id_of_the_config(tmp_path: Path) -> None:
    corpus().tofile(tmp_path / "ids.bin")
    section = DataSection(
        source="tokens", paths=(str(tmp_path / "ids.bin"),), seq_len=4, val_fraction=0.2, packing="on", end_id=END
    )
    assert load_corpus(section).documents == Documents(end_id=END)


def test_a_tokenizer_that_names_no_end_token_needs_the_id(tmp_path: Path) -> None:
    tokenizer: Any = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a")
    own: dict[str, Any] = {"source": "text", "paths": (str(tmp_path / "text.txt"),), "seq_len": 1, "val_fraction": 0.5}
    own |= {"tokenizer": str(tmp_path / "tokenizer.json"), "packing": "on"}
    with pytest.raises(DataError, match="names the token that ends one"):
        load_corpus(DataSection(**own))
