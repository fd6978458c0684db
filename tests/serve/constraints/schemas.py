"""Random JSON schemas of bounded answers, and whether a value keeps to one; by hand, so that nothing of ours judges."""

import random
from typing import Any


def random_schema(rng: random.Random, *, depth: int = 2) -> dict[str, Any]:
    """A schema whose longest answer has some 150 letters without spaces."""
    kinds = ["integer", "string", "boolean", "enum", "null", *(["object", "array"] if depth else [])]
    kind = rng.choice(kinds)
    if kind == "integer":
        least = rng.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 900)}
    if kind == "string":
        least = rng.randint(0, 2)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 5)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 12, None, True, 'a"b', 1.5], k=rng.randint(1, 4))}
    if kind == "array":
        return {
            "type": "array",
            "items": random_schema(rng, depth=depth - 1),
            "minItems": rng.randint(0, 1),
            "maxItems": rng.randint(1, 2),
        }
    if kind == "object":
        names = rng.sample("abcdef", k=rng.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth=depth - 1) for name in names},
            "required": rng.sample(names, k=rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    return {"type": kind}


def keeps_to(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a parsed value is one of the schema's."""
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "array":
        is_long = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return is_long and all(keeps_to(one, schema["items"]) for one in value)
    if kind == "object":
        inner = schema["properties"]
        is_whole = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(inner)
        return is_whole and all(keeps_to(one, inner[name]) for name, one in value.items())
    return value is None if kind == "null" else isinstance(value, bool)
