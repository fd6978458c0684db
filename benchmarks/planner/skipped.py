"""The reason why a published row is not predicted."""


class RowSkippedError(Exception):
    """A row that cannot be predicted, with the reason."""
