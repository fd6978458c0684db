"""What process 0 tells the others before each step of the engine: requests and cancellations, in their order.

The engine of every process starts alike and steps alike, so requests get the same ids, slots and pages everywhere.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..constraints.constraint import Constraint
from ..requests import Request

Event = Request | int
"""A request that was submitted, or the id of a sequence that was cancelled."""


def write_events(events: Sequence[Event]) -> str:
    """Return events as a line of JSON; floats keep every bit."""
    return json.dumps([event if isinstance(event, int) else asdict(event) for event in events])


def read_events(text: str) -> list[Event]:
    """Return the events of `write_events`."""
    return [event if isinstance(event, int) else _read_request(event) for event in json.loads(text)]


def _read_request(fields: dict[str, Any]) -> Request:
    constraint = fields.pop("constraint")
    return Request(**fields, constraint=None if constraint is None else Constraint(**constraint))
