"""Trackers, the real packages, are sent what metrics.jsonl holds, into one run however often it is resumed."""

import importlib.util
import io
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trellax.configs import RunConfig
from trellax.meshes import ConfigError
from trellax.train import train
from trellax.train.metrics import MetricsLog, read_metrics
from trellax.train.metrics.trackers.open import TRACKERS_FILE, Trackers, check_trackers
from trellax.train.metrics.trackers.tracker import Ended, Tracker

Tiny = Callable[..., RunConfig]
Sent = dict[int, dict[str, float]]

LINES: list[tuple[int, dict[str, float]]] = [
    (1, {"loss": 5.5, "lr": 1e-3}),
    (2, {"loss": 5.0}),
    (2, {"val_loss": 5.25}),
]


def lines_of(folder: Path) -> Sent:
    """Return the numbers in metrics.jsonl by step."""
    found: Sent = {}
    for line in read_metrics(folder):
        found.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k != "step" and v is not None})
    return found


def write(folder: Path, name: Any, lines: list[tuple[int, dict[str, float]]], *, resumed_step: int) -> list[str]:
    said: list[str] = []
    own: dict[str, Any] = {"hyperparameters": {"model.norm": "rmsnorm", "train.init_from": "", "train.steps": 4}}
    with MetricsLog(folder, resumed_step=resumed_step, **own, log_to=[name], say=said.append) as log:
        for step, values in lines:
            log.write(step, values | {"mfu": float("nan")})
    return said


class Failing(Tracker):
    """A tracker whose server is gone after the first step."""

    id = place = "nowhere"

    def __init__(self) -> None:
        self.got: list[int] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.got:
            raise ConnectionError("no route to host\nsecond line")
        self.got.append(step)

    def close(self, ended: Ended) -> None:
        raise AssertionError("closed after it failed")


def test_tracker_that_fails_is_left_out_and_named() -> None:
    tracker, said = Failing(), list[str]()
    trackers = Trackers({"wandb": tracker}, say=said.append)
    for step in range(3):
        trackers.write(step, {"loss": 1.0})
    trackers.close("whole")
    assert tracker.got == [0]
    assert said == ["wandb failed and gets nothing more of this command: ConnectionError: no route to host"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_tracker_that_is_not_installed_is_refused_before_a_run_starts(name: Any, tiny: Tiny) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf"needs the package {name}, which is not installed") as caught:
        train(tiny(f"--mesh.data 8 --train.log_to {name}"))
    assert caught.value.fix == f"pip install 'trellax[{name}]'."
    assert not tiny().run_folder.exists()


def test_log_without_trackers_writes_no_file_of_theirs(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 5.0})
    assert not (tmp_path / TRACKERS_FILE).exists()


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: blocks of 32 KiB of parts (checksum, length, kind), after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, block, found = file.read_bytes(), 7, 1 << 15, b""
    while place < len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        found += data[place + 7 : place + 7 + length]
        place += 7 + length
        # A whole record, or the last part of one.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(found)
            yield record
            found = b""


def sent_to_wandb(folder: Path) -> tuple[Sent, set[str]]:
    """Return what the offline folders of a run hold, by step, and the ids of their runs."""
    found: Sent = {}
    ids = set()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        records: list[Any] = []
        # wandb's process writes the file a moment after `finish` has returned.
        for _ in range(100):
            records = list(wandb_records(file))
            if records and records[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        for record in records:
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                values = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                found.setdefault(values["_step"], {}).update({k: v for k, v in values.items() if not k.startswith("_")})
    return found, ids


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wandb write folders; it keeps the settings of its first call until it is torn down."""
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.filterwarnings("ignore")
def test_offline_folders_of_wandb_hold_the_metrics_under_one_id(tmp_path: Path, offline: None) -> None:
    check_trackers(["wandb"])
    write(tmp_path, "wandb", LINES, resumed_step=0)
    assert sent_to_wandb(tmp_path)[0] == lines_of(tmp_path)
    # Resumed at step 2, in another command.
    write(tmp_path, "wandb", [(3, {"loss": 4.0}), (4, {"loss": 3.5})], resumed_step=2)
    sent, ids = sent_to_wandb(tmp_path)
    assert sent == lines_of(tmp_path)
    assert ids == {json.loads((tmp_path / TRACKERS_FILE).read_text())["wandb"]}


@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_key_is_refused(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"train\.log_to='wandb' cannot log: UsageError: No API key"):
        check_trackers(["wandb"])


def sent_to_mlflow(folder: Path) -> Sent:
    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(), json.loads((folder / TRACKERS_FILE).read_text())["mlflow"]
    found: Sent = {}
    for name in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, name)
        assert len({point.step for point in history}) == len(history), "a value was sent twice"
        for point in history:
            found.setdefault(point.step, {})[name] = point.value
    return found


@pytest.fixture
def file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder, with MLflow's files beside it."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore")
def test_run_in_mlflow_holds_the_metrics_and_is_gone_on_with(file_store: Path) -> None:
    from mlflow.tracking import MlflowClient

    check_trackers(["mlflow"])
    write(file_store, "mlflow", LINES, resumed_step=0)
    first = (file_store / TRACKERS_FILE).read_text()
    assert sent_to_mlflow(file_store) == lines_of(file_store)
    # Step 2 is taken again, and a line is there that MLflow lacks.
    file = file_store / "metrics.jsonl"
    file.write_text('{"step": 0, "val_loss": 5.6}\n' + file.read_text())
    write(file_store, "mlflow", [(2, {"loss": 5.0}), (3, {"loss": 4.0})], resumed_step=1)
    assert {step: own for step, own in sent_to_mlflow(file_store).items() if step != 2} == {
        step: own for step, own in lines_of(file_store).items() if step != 2
    }
    assert (file_store / TRACKERS_FILE).read_text() == first
    run = MlflowClient().get_run(json.loads(first)["mlflow"])
    assert (run.info.status, run.data.params["train.steps"]) == ("FINISHED", "4")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_run_logs_to_both_and_goes_on_with_both(tiny: Tiny, file_store: Path, offline: None) -> None:
    words = "--mesh.data 8 --train.log_to wandb,mlflow --train.log_every 1 --train.eval_every 2"
    for steps in (2, 4):
        config = tiny(f"{words} --train.steps {steps}")
        train(config, console=Console(file=io.StringIO()), changes="accept")
    expected = lines_of(config.run_folder)
    assert sorted(expected) == [1, 2, 3, 4]
    assert sent_to_wandb(config.run_folder)[0] == expected
    assert sent_to_mlflow(config.run_folder) == expected
