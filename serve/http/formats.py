"""The forms of answers that requests ask for: `response_format` of OpenAI's API, and what clients of vLLM send.

A request has one of them at most. vLLM 0.11 and later write `structured_outputs`, earlier ones `guided_json`,
`guided_regex` and `guided_choice`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...meshes import ServeError
from ..constraints.constraint import Constraint
from .errors import HttpError

Schema = dict[str, Any] | bool | str
"""A JSON schema, or its text."""

_MOST_CHOICES = 4096
Choices = Annotated[list[str], Field(min_length=1, max_length=_MOST_CHOICES, fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class SchemaFormat(_Strict):
    """A schema with a name, as OpenAI has it; `strict` changes nothing, since answers always keep to the schema."""

    name: str | None = None
    description: str | None = None
    form: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """OpenAI's field: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(_Strict):
    """vLLM's field."""

    form: Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None


class FormFields(_Strict):
    """The fields of a request that constrain its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None

    def constraint(self) -> tuple[Constraint, str] | None:
        """Return the constraint of the request and the name of its field; None for any text.

        Raises:
            HttpError: there are several, or the one is broken.
        """
        found = [*self._asked()]
        if not found:
            return None
        if len(found) > 1:
            names = " and ".join(name for name, _, _ in found)
            raise HttpError(f"{names} each ask for a form of the answer.", fix="send one.", param=found[1][0])
        name, make, given = found[0]
        try:
            return (make() if given is None else make(given)), name
        except ServeError as error:
            raise HttpError(error.problem, fix=error.fix, param=name) from None

    def _asked(self) -> list[tuple[str, Callable[..., Constraint], Any]]:
        own = self.structured_outputs or StructuredOutputs()
        return [
            *_of_response_format(self.response_format),
            *_given("structured_outputs", Constraint.json_schema, own.form),
            *_given("structured_outputs", Constraint.regex, own.regex),
            *_given("structured_outputs", Constraint.choice, own.choice),
            *([("structured_outputs", Constraint.json_object, None)] if own.json_object else []),
            *_given("guided_json", Constraint.json_schema, self.guided_json),
            *_given("guided_regex", Constraint.regex, self.guided_regex),
            *_given("guided_choice", Constraint.choice, self.guided_choice),
        ]


def _given(name: str, make: Callable[..., Constraint], value: Any) -> list[tuple[str, Callable[..., Constraint], Any]]:
    return [] if value is None else [(name, make, value)]


def _of_response_format(own: ResponseFormat | None) -> list[tuple[str, Callable[..., Constraint], Any]]:
    if own is None or own.type == "text":
        return []
    if own.type == "json_object":
        return [("response_format", Constraint.json_object, None)]
    if own.json_schema is None:
        raise HttpError(
            "response_format is of type json_schema, and has no schema.",
            fix='send {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
            param="response_format",
        )
    schema = own.json_schema.form
    return [("response_format", Constraint.json_object if schema is None else Constraint.json_schema, schema)]
