"""Tensor and pipeline parallel transformers in JAX; every part is imported by its name, as in `trellax.pipeline`."""

TYPE_CHECKING = False  # as in `typing`, whose import would cost more than the rest of this file
if TYPE_CHECKING:
    __version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for, since that takes 50 ms."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version(__name__)
