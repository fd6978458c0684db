"""Check that a size divides evenly over the parts of a mesh, and name the sizes near it that do."""

from .errors import TrellaxError


def nearest_multiples(value: int, divisor: int) -> tuple[int, int]:
    """Return the largest multiple of the divisor that is not above the value, and the smallest that is not below it.

    >>> nearest_multiples(10, 4)
    (8, 12)
    >>> nearest_multiples(8, 4)
    (8, 8)
    """
    below = value // divisor * divisor
    return below, below if below == value else below + divisor


def check_divides(
    name: str, value: int, *, over: str, parts: int, error: type[TrellaxError], rule: str = "", fix: str | None = None
) -> None:
    """Raise `error` unless `parts` divides the value.

    >>> check_divides("ffn_size", 10, over="tensor", parts=4, error=ModelError)
    ModelError: ffn_size=10 does not split over tensor=4: 10 / 4 = 2.50.
      Fix: set ffn_size=12, or choose a tensor size that divides 10.

    Args:
        over: what the value is split over: an axis, or sizes already written out, `pipe=2 x tensor=2`.
        rule: why it must divide, to stand before the quotient: "heads are divided evenly, but ".
        fix: what to do instead of the default, the next larger multiple or another size of the axis.

    Raises:
        TrellaxError: of the class `error`.
    """
    if value % parts == 0:
        return
    _, larger = nearest_multiples(value, parts)
    axis = over.rpartition(".")[2]
    article = "an" if axis[0] in "aeiou" else "a"
    raise error(
        f"{name}={value} does not split over {over if '=' in over else f'{over}={parts}'}: "
        f"{rule}{value} / {parts} = {value / parts:.2f}.",
        fix=fix or f"set {name}={larger}, or choose {article} {axis} size that divides {value}.",
    )
