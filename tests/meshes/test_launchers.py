"""Who a process is: by its own words, under SLURM, under Open MPI; and what is missing."""

from collections.abc import Callable

import pytest
from trellax.meshes import MeshError
from trellax.meshes.processes.launchers import Processes, find_processes

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],fat1",
    "SLURM_STEP_NUM_NODES": "5",
    "SLURM_NTASKS": "40",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
}


def find(environ: dict[str, str] | None = None, **given: object) -> Processes | None:
    words = {"coordinator": None, "count": None, "index": None} | given
    return find_processes(**words, environ=environ or {})  # type: ignore[arg-type]


def test_a_single_process_joins_nothing() -> None:
    assert find() is None
    assert find(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    # An sbatch script before srun knows of tasks, but is one process.
    assert find({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}) is None


def test_arguments_alone_are_enough() -> None:
    assert find(coordinator="[::1]:5000", count=2, index=1) == Processes(coordinator="[::1]:5000", count=2, index=1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[007-009,012],fat1", "gpu007"), ("a1", "a1"), ("a1,a2", "a1"), ("a[3,5-6]", "a3"), ("a1,b[2-3]", "a1")],
)
def test_slurm_gives_every_number(nodes: str, host: str) -> None:
    found = find(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == Processes(coordinator=f"{host}:{61440 + 146}", count=40, index=9, local_count=8, local_index=1)


def test_open_mpi_on_one_machine_gives_every_number_and_its_processes_agree() -> None:
    found = find(OPEN_MPI)
    assert found
    assert (found.count, found.index, found.local_index) == (4, 3, 3)
    other = find(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert other
    assert found.coordinator == other.coordinator
    assert found.coordinator.startswith("127.0.0.1:")


def test_arguments_take_precedence_over_the_launcher() -> None:
    found = find(SLURM, coordinator="node1:1234")
    assert found
    assert found.coordinator == "node1:1234"


MISTAKES: dict[str, dict] = {
    "no_coordinator": {"count": 2, "index": 0},
    "no_process_id": {"coordinator": "node1:1", "count": 2},
    "open_mpi_over_machines": {"environ": OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}},
    "slurm_tasks_in_words": {"environ": SLURM | {"SLURM_NTASKS": "many"}},
    "slurm_of_no_node": {"environ": SLURM | {"SLURM_STEP_NUM_NODES": "0"}},
    "open_mpi_rank_below_0": {"environ": OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "-1"}},
    "process_id_too_large": {"coordinator": "node1:1", "count": 2, "index": 2},
    "coordinator_without_port": {"coordinator": "node1", "count": 2, "index": 0},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_with_a_fix(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(MeshError) as caught:
        find(**MISTAKES[name])
    golden(f"errors/meshes/processes_{name}.txt", f"MeshError: {caught.value}")
