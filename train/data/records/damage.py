"""Count damaged records, name the first of them, and refuse a corpus that has more than a small share of them."""

from collections.abc import Callable, Sequence

from ....meshes import DataError
from ....meshes.errors import shown, suggest

MOST_DAMAGED = 1e-3
"""Share of damaged records from which a corpus is refused."""

_SHOWN = 5


class Damage:
    """Count the records that were read, and those that could not be, with the places of the first of them."""

    def __init__(self) -> None:
        self.num_records, self.num_damaged = 0, 0
        self.places: list[str] = []

    def add(self, place: str | Callable[[], str], why: str) -> None:
        """Count a record that cannot be read; `place` is a file and a line, or computes them if they are shown."""
        self.num_records += 1
        self.num_damaged += 1
        if len(self.places) < _SHOWN:
            self.places.append(f"{place if isinstance(place, str) else place()}: {why}")

    def merge(self, *, num_records: int, num_damaged: int, places: Sequence[str]) -> None:
        """Add the counts of another part of the corpus."""
        self.num_records += num_records
        self.num_damaged += num_damaged
        self.places = [*self.places, *places][:_SHOWN]

    def check(self, *, most: float = MOST_DAMAGED) -> None:
        """Raise if more than a share `most` of the records is damaged.

        Raises:
            DataError: it is; the first places are named.
        """
        if self.num_damaged <= most * self.num_records:
            return
        more = self.num_damaged - len(self.places)
        lines = "".join(f"\n  {place}" for place in self.places) + (f"\n  and {more:,} more" if more else "")
        raise DataError(
            f"{self.num_damaged:,} of {self.num_records:,} records are damaged, more than {_percent(most)}:{lines}",
            fix="repair these lines, or leave them out.",
        )

    def __str__(self) -> str:
        """Return a note on the damaged records, "" if there are none."""
        if not self.num_damaged:
            return ""
        return f"{self.num_damaged:,} of {self.num_records:,} records damaged and left out ({'; '.join(self.places)})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


NAME_FIELD = "name the right one: data.text_field of a config, --text-field of `trellax data` and `trellax eval`."
"""The `Fix:` line for a field that is not there, or holds something else."""


def no_field(place: str, field: str, known: Sequence[str]) -> DataError:
    """Return the error for a record, or a table, without the field that is read."""
    names = ", ".join(shown(name, limit=40) for name in known[:20]) or "none"
    return DataError(
        f"{place}: there is no field {field!r}; the fields are {names}.{suggest(field, known)}",
        fix=NAME_FIELD,
    )
