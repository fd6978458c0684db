"""Read the memory of the larger programs that RESULTS.md has, those of `benchmarks/gpu_programs`.

They were compiled, for H100 and H200, before the planner's memory was mended by the cases of `cases.py`.
"""

from pathlib import Path

from trellax.configs import load_config
from trellax.configs.run_config import RunConfig

from benchmarks.gpu_programs.cases import CASES, label, overrides

_RESULTS = Path(__file__).parents[1] / "RESULTS.md"
_GIB = 2.0**30


def read_recorded() -> dict[str, tuple[RunConfig, str, float]]:
    """Return the config, the accelerator and the bytes of every candidate that the table of RESULTS.md has, by name."""
    table = _RESULTS.read_text().partition("**All candidates**")[2].partition("\n\n**")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    stated = {(line[0], line[2]): _GIB * float(line[3]) for line in lines if line[1] == "candidate"}
    found = {}
    for case in CASES:
        config, *words = case.config.split()
        for settings in case.candidates:
            if num_bytes := stated.get((case.name, label(settings))):
                run = load_config(config, [*words, *overrides(settings)])
                found[f"{case.name}: {label(settings)}"] = (run, case.target.partition(":")[0], num_bytes)
    return found
