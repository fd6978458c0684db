"""`trellax calibrate`: the file it writes is planned with, its JSON, a measured step, and its mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.plan.calibration import measure
from trellax.plan.calibration.measure import Sizes

MISTAKES = {
    "name": "calibrate machine.json",
    "folder": "calibrate nowhere/machine.toml",
    "config": "calibrate machine.toml --config quickstrt",
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes half a minute takes a second."""
    monkeypatch.setattr(measure, "_OF_CPU", Sizes(products=(64,), taller=2, copied=1 << 20, summed=(1 << 16, 1 << 18)))
    monkeypatch.setattr(measure, "_BUDGET_S", 0.01)


def test_plan_takes_what_calibrate_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    assert main(["calibrate", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["topology"]["devices"] == 8
    assert {one["name"].split()[0] for one in told["measured"]} == {"product", "copy", "all-reduce"}
    assert told["step"] is None
    assert err.splitlines()[0].startswith("1/6 product bfloat16 64")
    assert main(["plan", "quickstart", "--topology", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["topology"] == "machine"


@pytest.mark.slow
def test_step_of_a_config_is_measured_beside_its_prediction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["calibrate", str(tmp_path / "machine.toml"), "--config", "quickstart", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    assert step["measured_s"] > 0
    assert step["error"] == pytest.approx(step["predicted_s"] / step["measured_s"] - 1)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported(name: str, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert main(MISTAKES[name].split()) == 2
    golden(f"errors/commands/calibrate_{name}.txt", capsys.readouterr().err)
