"""Check a config against itself and the devices, and build its mesh, before any array is made."""

from ..configs.check import CorpusFiles, check_run
from ..configs.run_config import RunConfig
from ..meshes import build_mesh, use_fake_devices
from ..meshes.build import visible_devices
from .state import Setup


def prepare(config: RunConfig, *, corpus: CorpusFiles = "later") -> Setup:
    """Check a run config, build its mesh, and return the setup of the run; no array is made.

    >>> setup = prepare(load_config("quickstart"))
    >>> setup.mesh.shape["pipe"]
    2

    Args:
        corpus: whether the files of the corpus must exist.

    Raises:
        TrellaxError: the config does not fit itself or the devices.
    """
    if config.run.fake_devices:
        use_fake_devices(config.run.fake_devices)
    spec = check_run(config, num_devices=len(visible_devices()), corpus=corpus)
    setup = Setup(config, build_mesh(spec))
    setup.check()
    return setup
