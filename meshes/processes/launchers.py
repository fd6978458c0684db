"""Find the number and index of processes under SLURM, Open MPI or from arguments. Read `join.py` next."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments import check_count
from ..errors import MeshError, shown
from ..numbers import whole_number

_PORTS = (61_440, 4_096)
"""First port and number of ports for coordinators without a given address; jax uses the same range."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of one program, seen from one of them; `local_` fields count those on its machine.

    Raises:
        MeshError: the numbers contradict each other.
    """

    coordinator: str
    count: int
    index: int
    local_count: int = 1
    local_index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise MeshError(
                f"--process-id {self.index} of --num-processes {self.count}: ids are 0 to {self.count - 1}.",
                fix="give every process an id of its own in that range.",
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or not 0 < int(port) < 65_536:
            raise MeshError(
                f"--coordinator {self.coordinator}: expected HOST:PORT.",
                fix="give the host of process 0 and a free port there, such as node1:61440.",
            )

    @property
    def host(self) -> str:
        """Host of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port on which process 0 listens."""
        return int(self.coordinator.rpartition(":")[2])


def find_processes(
    *, coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str] = os.environ
) -> Processes | None:
    """Return the processes from the arguments, or else from SLURM or Open MPI; None for a single process.

    Raises:
        MeshError: something is missing, or the numbers contradict each other.
    """
    for name, number in {"count": count, "index": index}.items():
        if number is not None:
            check_count(name, number, error=MeshError, least=0)
    found = _find_slurm(environ) or _find_open_mpi(environ)
    given = {"coordinator": coordinator, "count": count, "index": index}
    values: dict[str, Any] = found | {name: value for name, value in given.items() if value is not None}
    if not values or (values.get("count") == 1 and coordinator is None):
        return None
    options = {"coordinator": "--coordinator HOST:PORT", "count": "--num-processes N", "index": "--process-id I"}
    missing = [option for name, option in options.items() if values.get(name) is None]
    if missing:
        raise MeshError(
            f"several processes need all three to find each other; not given: {', '.join(missing)}.",
            fix="give all three, or start under srun or mpirun, which say the rest.",
        )
    return Processes(**values)


def _find_slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    # Without a step (in an sbatch script before srun) there is one process, whatever SLURM_NTASKS says.
    if not all(f"SLURM_{name}" in environ for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")):
        return {}
    nodes = environ["SLURM_STEP_NODELIST"]
    first, _, rest = nodes.partition("[")
    # "node[001-015,020],other", "node1,node2" or "node1"
    host = first.partition(",")[0]
    if "," not in first and rest:
        host += rest.replace("-", ",").replace("]", ",").partition(",")[0]
    count = _read_number(environ, "SLURM_NTASKS", least=1)
    num_nodes = _read_number({"SLURM_STEP_NUM_NODES": "1"} | dict(environ), "SLURM_STEP_NUM_NODES", least=1)
    return {
        "coordinator": f"{host}:{_PORTS[0] + _read_number(environ, 'SLURM_JOB_ID') % _PORTS[1]}",
        "count": count,
        "index": _read_number(environ, "SLURM_PROCID"),
        "local_count": -(-count // num_nodes),
        "local_index": _read_number(environ, "SLURM_LOCALID"),
    }


def _find_open_mpi(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {"count": "SIZE", "index": "RANK", "local_count": "LOCAL_SIZE", "local_index": "LOCAL_RANK"}
    if not all(f"OMPI_COMM_WORLD_{name}" in environ for name in names.values()):
        return {}
    found: dict[str, Any] = {key: _read_number(environ, f"OMPI_COMM_WORLD_{name}") for key, name in names.items()}
    if found["local_count"] == found["count"]:
        # All on this machine: derive the port from the launcher's job id, which they share.
        job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
        found["coordinator"] = f"127.0.0.1:{_PORTS[0] + zlib.crc32(job.encode()) % _PORTS[1]}"
    return found


def _read_number(environ: Mapping[str, str], name: str, *, least: int = 0) -> int:
    try:
        number = whole_number(environ[name])
    except ValueError:
        number = least - 1
    if number < least:
        raise MeshError(
            f"{name}={shown(environ[name])} in the environment is not a whole number of {least} or more.",
            fix=f"unset {name}, or start with the launcher that sets it.",
        )
    return number
