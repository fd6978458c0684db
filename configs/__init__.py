"""Read and check run configs, which are TOML files, and packaged configs such as `quickstart.toml`."""

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
