"""What is not free to change is told, also where a save is older than the key."""

from collections.abc import Callable

from trellax.configs import RunConfig
from trellax.configs.changes import list_changes

Tiny = Callable[..., RunConfig]


def test_changes_of_the_result_are_listed_and_others_are_not(tiny: Tiny) -> None:
    saved = tiny().model_dump(mode="json")
    assert list_changes(saved, tiny("--mesh.pipe 2 --checkpoint.every 3 --train.log_every 7")) == []
    assert list_changes(saved, tiny("--run.seed 5 --optimizer.beta1 0.5")) == [
        "run.seed: was 0, is 5",
        "optimizer.beta1: was 0.9, is 0.5",
    ]


def test_key_that_the_save_lacks_had_its_default(tiny: Tiny) -> None:
    saved = tiny().model_dump(mode="json")
    for key in ("attention_window", "num_kv_heads", "head_size"):
        del saved["model"][key]
    assert list_changes(saved, tiny("--model.num_kv_heads 0 --model.head_size 0")) == []
    assert list_changes(saved, tiny("--model.num_kv_heads 0 --model.head_size 0 --model.attention_window 8")) == [
        "model.attention_window: was 0, is 8"
    ]
