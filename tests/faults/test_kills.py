"""A run killed at any moment, saves included, goes on from its newest save as if nothing had been."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.train.metrics import read_metrics
from trellax.train.metrics.tensorboard import read_steps

from .conftest import losses
from .zygote import Child, Zygote, is_alive

STEPS = 25


def saved_steps(run_folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_folder / "checkpoints").glob("*") if path.name.isdigit())


def recorded_steps(run_folder: Path) -> dict[str, set[int]]:
    """Steps of each number in metrics.jsonl, as TensorBoard should have them."""
    found: dict[str, set[int]] = {}
    for line in read_metrics(run_folder):
        for name in line.keys() - {"step"}:
            found.setdefault(name, set()).add(line["step"])
    return found


def is_saving(run_folder: Path) -> bool:
    return any(".part" in path.name for path in (run_folder / "checkpoints").glob("*"))


def kill_at_random(child: Child, run_folder: Path, rng: random.Random) -> None:
    """Kill while it starts, while it saves, or a moment after it has saved something new."""
    choice, before = rng.random(), saved_steps(run_folder)
    if choice < 0.2:
        time.sleep(rng.uniform(0, 0.5))
    elif choice < 0.6:
        # What another process left is gone once it is compiled.
        child.wait_for("compiled  validation")
        wait_until(child, lambda: is_saving(run_folder))
        time.sleep(rng.uniform(0, 0.1))
    else:
        wait_until(child, lambda: saved_steps(run_folder)[-1:] > before[-1:])
        time.sleep(rng.expovariate(5))
    child.kill()


def wait_until(child: Child, is_so: Callable[[], bool]) -> None:
    while not is_so() and is_alive(child.pid):
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("seed", "num_kills"),
    [(0, 3), *(pytest.param(seed, 20, marks=(pytest.mark.slow, pytest.mark.timeout(900))) for seed in range(11))],
)
def test_run_killed_many_times_is_the_run_uncut(
    seed: int, num_kills: int, zygote: Zygote, folder: Path, tiny_words: str
) -> None:
    words = f"{tiny_words} --train.steps {STEPS} --checkpoint.every 1"
    code, whole = zygote.run(f"{words} --run.name whole{seed}-{num_kills}")
    assert code == 0, whole.said()
    expected = losses(folder / f"whole{seed}-{num_kills}")
    assert len(expected) == STEPS
    rng, kills, during_saves, resumes, number = random.Random(seed), 0, 0, 0, 0
    while kills < num_kills:
        number += 1
        run_folder = folder / f"killed{seed}-{num_kills}-{number}"
        code = -9
        while kills < num_kills and code == -9:
            before = saved_steps(run_folder)
            child = zygote.start(f"{words} --run.name {run_folder.name}")
            kill_at_random(child, run_folder, rng)
            code = zygote.wait(child)
            assert code in (0, -9), child.said()
            kills += code == -9
            during_saves += code == -9 and is_saving(run_folder)
            if before and "resumed" in child.said():
                resumes += 1
                assert f"resumed   at step {before[-1]} of" in child.said()
            # What was saved stays saved.
            assert not before or saved_steps(run_folder)[-1] >= before[-1]
        code, last = zygote.run(f"{words} --run.name {run_folder.name}")
        assert code == 0, last.said()
        assert losses(run_folder) == expected
        assert read_steps(run_folder / "tensorboard") == recorded_steps(run_folder)
        assert not is_saving(run_folder)
    assert during_saves >= num_kills // 10
    assert resumes > num_kills // 4
