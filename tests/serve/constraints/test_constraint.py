"""A form of answers is checked where it enters, and travels as text."""

import re

import pytest
from trellax.meshes import ServeError
from trellax.serve import Constraint, Request
from trellax.serve.constraints.constraint import MOST_LETTERS
from trellax.serve.processes.events import read_events, write_events


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Constraint.regex(""), "'' is not a regular expression"),
        (lambda: Constraint.regex("a" * (MOST_LETTERS + 1)), "131,073 letters, and at most 131,072"),
        (lambda: Constraint.json_schema("{"), "the JSON schema is not JSON"),
        (lambda: Constraint.json_schema("[" * 10**5), "the JSON schema is not JSON"),
        (lambda: Constraint.json_schema("12"), "a JSON schema is an object, and this one is 12"),
        (lambda: Constraint.json_schema({"enum": [{1, 2}]}), "the JSON schema is not JSON"),
        (lambda: Constraint.choice([]), "is no choice"),
        (lambda: Constraint.choice(["a", ""]), "is no choice"),
        (lambda: Constraint(kind="json-schema", text="{}"), "Did you mean 'json_schema'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_form_is_refused(make: object, told: str) -> None:
    with pytest.raises(ServeError, match=re.escape(told)):
        make()  # type: ignore[operator]


def test_a_choice_is_taken_literally() -> None:
    pattern = Constraint.choice(["a.b", "c|d", "(e)"]).text
    assert [bool(re.fullmatch(pattern, text)) for text in ("a.b", "c|d", "(e)", "axb", "c", "e")] == [True] * 3 + [
        False
    ] * 3


def test_a_form_reaches_other_processes_as_it_is() -> None:
    request = Request(prompt=(1,), constraint=Constraint.json_schema({"enum": ["é", 1.5]}))
    assert read_events(write_events([request, 3])) == [request, 3]
