"""Trackers, each with its real package where that is installed, offline, and read back by its own reader."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from same import timeless

from fedtrio import trackers
from fedtrio.bench import Bench
from fedtrio.compare import Folder, compare
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError
from fedtrio.remote import settings_of

SMALL = ["data.max_train=24", "data.max_test=10", "data.max_public=8", "rounds=2", "threads=1", "train.precision=fp32"]
SMALL += ["frameworks=[fedllm]", "lora.r=2"]
Told = tuple[dict[str, str], dict[str, dict[int, float]]]  # parameters, metrics by step


def config(*more: str) -> Config:
    return load_config(settings=[*SMALL, *more])


@pytest.fixture(scope="module")
def untold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compare(config(), tmp_path_factory.mktemp("untold"), jobs=1)


# What each tracker holds in the end -----------------------------------------------------------------------------------


def tensorboard(run: Path) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = EventAccumulator(str(run / "tensorboard" / "fedllm-0"))
    found.Reload()
    raw = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(raw).session_start_info
    plain = {key: value.string_value or f"{value.number_value:g}" for key, value in start.hparams.items()}
    return plain, {key: {e.step: e.value for e in found.Scalars(key)} for key in found.Tags()["scalars"]}


def mlflow(run: Path) -> Told:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedtrio")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == f"{run.name}/fedllm-0" and found.info.status == "FINISHED"
    keys = found.data.metrics
    history = {key: {m.step: m.value for m in client.get_metric_history(found.info.run_id, key)} for key in keys}
    return found.data.params, history


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log after a file header of 7 bytes: blocks of 32 KiB; each piece has crc, length, type."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb(run: Path) -> Told:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # another process writes it, and ends after we do
        records = [Record.FromString(data) for data in leveldb_log(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.1)
    plain: dict[str, str] = {}
    history: dict[str, dict[int, float]] = {}
    for record in records:
        items = record.run.config.update, record.history.item
        named, row = ({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in found} for found in items)
        plain |= {key: str(value) for key, value in named.items()}
        for key in row.keys() - {"_step", "_timestamp", "_runtime"}:
            history.setdefault(key, {})[int(row["_step"])] = row[key]
    return plain, history


def trackio(run: Path) -> Told:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}/fedllm-0"
    history: dict[str, dict[int, float]] = {}
    for row in SQLiteStorage.get_logs("fedtrio", name):
        for key in row.keys() - {"step", "timestamp"}:
            history.setdefault(key, {})[row["step"]] = row[key]
    found = SQLiteStorage.get_run_config("fedtrio", name)
    return {key: str(value) for key, value in (found or {}).items()}, history


READ: dict[str, Callable[[Path], Told]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
    "trackio": trackio,
}


@pytest.mark.parametrize("name", READ)
def test_tracker_is_told_all_and_changes_nothing(
    name: str, tmp_path: Path, untold: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip(name)
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    results = compare(config(f"report_to=[{name}]"), tmp_path / "told", jobs=1)
    assert capsys.readouterr().out == ""  # it is for results.json alone, with --json
    parameters, metrics = READ[name](tmp_path / "told")
    assert parameters["framework"] == "fedllm" and parameters["lora.r"] == "2" and parameters["seed"] == "0"
    (run,) = results["runs"]
    for key in ("accuracy", "loss", "bytes_up", "messages", "client_flops"):
        assert metrics[key] == {entry["round"]: pytest.approx(entry[key]) for entry in run["curve"]}, key
    for key in ("client_peak_bytes", "round_seconds"):
        assert metrics[key] == {2: pytest.approx(run[key])}, key
    assert metrics["client_accuracy.min"] == {2: pytest.approx(run["client_accuracy"]["min"])}
    assert timeless(results) == timeless(untold)


def test_a_tracker_that_breaks_is_named_once(
    tmp_path: Path, untold: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()  # a file where its folder should be
    with caplog.at_level(logging.WARNING, "fedtrio"):
        results = compare(config("report_to=[tensorboard]"), tmp_path / "run", jobs=1)
    assert timeless(results["runs"][0]["curve"]) == timeless(untold["runs"][0]["curve"])
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("fedtrio")]
    assert "report_to: tensorboard broke and is left out" in said


def test_a_run_that_was_broken_off_is_told_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    def stop(framework: str, seed: int, entry: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config("report_to=[tensorboard]"), tmp_path / "run", stop, jobs=1)
    _, before = tensorboard(tmp_path / "run")
    assert before["accuracy"].keys() == {1}
    (run,) = compare(config("report_to=[tensorboard]"), tmp_path / "run", jobs=1)["runs"]
    _, after = tensorboard(tmp_path / "run")
    assert after["accuracy"] == {entry["round"]: pytest.approx(entry["accuracy"]) for entry in run["curve"]}


def test_it_belongs_to_no_configuration(tmp_path: Path, untold: dict[str, Any]) -> None:
    """Neither the folder's nor the sites'."""
    Folder(tmp_path, config().resolved()).write(untold | {"runs": []})
    assert Folder(tmp_path, config("report_to=[wandb]").resolved()).finished() == []
    with pytest.raises(ConfigError, match="rounds"):
        Folder(tmp_path, config("report_to=[wandb]", "rounds=3").resolved()).finished()
    told = settings_of(Bench(config("report_to=[wandb]")), "run")
    assert "lora" in told["config"] and "report_to" not in told["config"]


def test_a_missing_package_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "mlflow_that_is_not_here")
    with pytest.raises(ConfigError, match=r"mlflow is not installed here: pip install 'fedtrio\[mlflow\]'"):
        compare(config("report_to=[mlflow]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_names_are_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        config("report_to=[tensorbord]")


@pytest.mark.slow
def test_runs_in_other_processes_are_told_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    results = compare(config("report_to=[tensorboard]", "frameworks=[fedllm, local]"), tmp_path / "run", jobs=2)
    _, metrics = tensorboard(tmp_path / "run")
    assert metrics["bytes_up"] == {e["round"]: pytest.approx(e["bytes_up"]) for e in results["runs"][0]["curve"]}
    assert (tmp_path / "run" / "tensorboard" / "local-0").is_dir()
