"""Run files: experiments as TOML, one file each, and the code that reads and checks them."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .check import check_run
    from .run_config import RunConfig, config_from_dict, load_config
    from .saved_config import load_saved_config

__all__ = [
    "RunConfig",
    "check_run",
    "config_from_dict",
    "load_config",
    "load_saved_config",
]

make_lazy(__name__)
