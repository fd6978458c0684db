"""Processes that differ are named with the key and both values, in one line however many they are."""

from trellax.meshes.processes.agreement import describe_differences, name_processes


def test_processes_that_agree_have_no_differences() -> None:
    assert describe_differences({0: {"train.steps": "10"}, 1: {"train.steps": "10"}}) == ""


def test_process_and_key_and_both_values_are_named() -> None:
    facts = {0: {"train.steps": "10", "jax": "0.10.2"}, 1: {"train.steps": "20", "jax": "0.10.2"}}
    assert describe_differences(facts) == "process 1 has train.steps=20, process 0 has 10"


def test_processes_that_differ_alike_are_reported_together_and_many_keys_are_counted() -> None:
    first = {f"key{number}": "a" for number in range(7)}
    other = {f"key{number}": "b" for number in range(6)} | {"more": "c"}
    told = describe_differences({0: first, 1: first, 2: other, 5: other})
    assert told == (
        "processes 2 and 5 have key0=b, process 0 has a; processes 2 and 5 have key1=b, process 0 has a; "
        "processes 2 and 5 have key2=b, process 0 has a; processes 2 and 5 have key3=b, process 0 has a; "
        "and 4 more differ"
    )


def test_long_values_are_shown_from_where_they_part() -> None:
    same = "--xla_flag=1 " * 20
    told = describe_differences({0: {"XLA_FLAGS": f"{same}--last=1"}, 1: {"XLA_FLAGS": f"{same}--last=2"}})
    assert "--last=2..., process 0 has ..." in told
    assert len(told) < 250


def test_processes_are_named_up_to_four() -> None:
    assert name_processes([3]) == "process 3"
    assert name_processes({5, 1}) == "processes 1 and 5"
    assert name_processes(range(1, 9)) == "processes 1, 2, 3, 4 and 4 more"
