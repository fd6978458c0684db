"""The benchmark of GPU programs: words of a command line, the best candidate, and targets."""

import pytest
from trellax.configs import load_config

from benchmarks.gpu_programs.cases import CASES, Case, label, overrides
from benchmarks.gpu_programs.run import Row, best_of, line_of, targets_of

CASE = Case(name="x", config="x", target="x", limit_s=6.0, before=None, candidates=())


def row(total_s: float, *, verdict: str = "fits", when: str = "candidate") -> Row:
    names = ("waiting_s", "exposed_s", "matrix_s", "vector_s", "launches_s")
    times_s = {**dict.fromkeys(names, 0.0), "total_s": total_s}
    return Row(case="x", when=when, settings=f"{total_s}", verdict=verdict, times_s=times_s, memory_bytes=10**9)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_setting_is_a_config(case: Case) -> None:
    for settings in (case.before, *case.candidates):
        assert settings is not None
        config, *words = case.config.split()
        loaded = load_config(config, [*words, *overrides(settings)])
        assert loaded.train.shard == settings.get("shard", "none")
        assert label(settings)


def test_the_fastest_that_fits_is_best() -> None:
    rows = [row(1.0, when="before"), row(2.0, verdict="over XLA's limit"), row(3.0), row(4.0)]
    assert best_of(rows).total_s == 3
    assert best_of(rows[:2]).total_s == 2
    (target,) = targets_of(CASE, rows)
    assert (target.measured, target.limit, target.is_met) == (3, 6, True)


def test_a_step_that_does_not_compile_is_never_best_and_says_why() -> None:
    failed = Row(case="x", when="candidate", settings="y", error="ConfigError: no")
    assert best_of([failed, row(3.0, verdict="does not fit")]).total_s == 3
    assert "ConfigError: no" in line_of(failed, "candidate")
    assert len(line_of(failed, "candidate")) == len(line_of(row(1.0), "after"))


def test_memory_is_the_target_of_a_case_without_seconds() -> None:
    case = Case(name="x", config="x", target="x", limit_s=None, before=None, candidates=())
    (target,) = targets_of(case, [row(3.0)])
    assert (target.measured, target.limit) == (1.0, 80.0)
