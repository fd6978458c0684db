"""The form that an answer must have: a JSON schema, or a regular expression. Plain data, which travels with a request.

`grammars.py` compiles it for the tokens of a model, and `masks.py` tells the devices after each token which ones may
follow.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from ...meshes import ServeError
from ...meshes.arguments import check_choice
from ...meshes.errors import shown

MOST_LETTERS = 1 << 17
"""Length of the longest schema or expression; it bounds the time of compiling to about a second."""

Kind = Literal["json_schema", "regex"]


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A form of answers.

    >>> Constraint.regex("[0-9]{3}")
    Constraint(kind='regex', text='[0-9]{3}')

    Args:
        kind: "json_schema" for a JSON Schema (draft 2020-12), "regex" for a regular expression that the whole answer
            matches, without look-around and backward references.
        text: the schema as JSON, or the expression.

    Raises:
        ServeError: the text is empty or too long, or a schema is not JSON.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("json_schema", "regex"), error=ServeError)
        name = "a JSON schema" if self.kind == "json_schema" else "a regular expression"
        if not isinstance(self.text, str) or not self.text:
            raise ServeError(f"{shown(self.text)} is not {name}.", fix="give a text that is not empty.")
        if len(self.text) > MOST_LETTERS:
            raise ServeError(
                f"{name} has {len(self.text):,} letters, and at most {MOST_LETTERS:,} are compiled.",
                fix="give a shorter one.",
            )
        if self.kind == "json_schema":
            _check_json(self.text)

    @classmethod
    def json_schema(cls, schema: Any) -> Self:
        """Return the constraint to JSON of a schema: a dict or a boolean, or its text."""
        if isinstance(schema, str):
            return cls(kind="json_schema", text=schema)
        try:
            return cls(kind="json_schema", text=json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise ServeError(f"the JSON schema is not JSON: {error}.", fix="give a dict of JSON values.") from None

    @classmethod
    def json_object(cls) -> Self:
        """Return the constraint to any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Return the constraint to texts that match a regular expression as a whole."""
        return cls(kind="regex", text=pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """Return the constraint to one of several texts."""
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ServeError(f"{shown(texts)} is no choice.", fix="give a list of texts that are not empty.")
        return cls.regex("|".join(map(re.escape, texts)))


def _check_json(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServeError(f"the JSON schema is not JSON: {error}.", fix="check its brackets and quotes.") from None
    if not isinstance(schema, dict | bool):
        raise ServeError(
            f"a JSON schema is an object, and this one is {shown(schema)}.", fix='give {"type": "object", ...}.'
        )
