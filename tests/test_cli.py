"""The command line: what it writes, and that every fault ends in one or two lines and a documented exit code."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtrio import cli
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError, DataError, FedtrioError, MessageError, ModelError

SMALL = {
    "data.max_train": 40,
    "data.max_test": 20,
    "data.max_public": 8,
    "rounds": 1,
    "threads": 1,
    "train.precision": "fp32",
    "clients": 2,
    "partition": "{name: iid}",
    "frameworks": "[fedllm]",
}


@dataclass
class Said:
    """How a command ended and what it printed."""

    code: int | str | None
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`fedtrio …` in this process, through the very entry point."""

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedtrio", *map(str, words)])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return call


def small(*given: str, **changed: Any) -> list[str]:
    """`--set` words for a run of a second or two; later ones win."""
    pairs = [f"{key}={value}" for key, value in (SMALL | changed).items()] + list(given)
    return ["--jobs", "1", *(word for pair in pairs for word in ("--set", pair))]


def refused(said: Said, code: int, *wanted: str) -> None:
    """It ended with that code, in one or two lines on stderr that hold all of `wanted`, and without a traceback."""
    assert said.code == code, said.err
    lines = said.err.strip().splitlines()
    assert 1 <= len(lines) <= 2, said.err
    assert lines[0].startswith("fedtrio: ")
    assert "Traceback" not in said.err + said.out
    for words in wanted:
        assert words in said.err, f"{words!r} not in {said.err!r}"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# The words of the command ------------------------------------------------------------------------------------------


def test_version_and_help(run):
    assert run("--version").out.startswith("fedtrio 0.")
    shown = run("compare", "--help")
    assert shown.code == 0 and "--set" in shown.out and "--record-frames" in shown.out


def test_help_loads_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedtrio.cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "compare" in done.stdout
    assert "typer" in done.stderr and "torch" not in done.stderr


def test_a_real_process_ends_with_the_code():
    words = ["compare", "--set", "round=1"]
    done = subprocess.run([sys.executable, "-m", "fedtrio.cli", *words], capture_output=True, text=True, timeout=60)
    refused(Said(done.returncode, done.stdout, done.stderr), 2, "did you mean 'rounds'?")


def test_usage(run):
    refused(run("compere"), 2, "compere")
    refused(run("compare", "--ste", "rounds=1"), 2, "--ste")
    assert run().code == 2 and "compare" in run().out  # without a command: the help


# The configuration -------------------------------------------------------------------------------------------------


def test_unknown_key_names_the_near_one_and_the_line(run, tmp_path):
    path = written(tmp_path, "rounds: 1\n\ntrain:\n  batch_size: 4\n  learning_rte: 0.1\n")
    refused(run("compare", path), 2, f"{path}:5: train.learning_rte", "did you mean 'learning_rate'?")
    path = written(tmp_path, "# a comment\nround: 1\n")
    refused(run("compare", path), 2, f"{path}:2: round", "did you mean 'rounds'?")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rounds: many\n", (":1: rounds", "'many'")),
        ("task: classification\nrounds: 0\n", (":2: rounds", "greater than or equal to 1", "got 0")),
        ("participation: 1.5\n", (":1: participation", "1.5")),
        ("train:\n  optimizer: adma\n", (":2: train.optimizer", "adamw", "'adma'")),
        ("frameworks: [fedllm, fedllm]\n", (":1: frameworks", "twice")),
        ("frameworks: [fedlm]\n", (":1: frameworks", "fedllm")),
        ("seeds: []\n", (":1: seeds",)),
        ("partition: {name: iid, alpha: 1}\n", (":1: partition", "alpha", "dirichlet")),
        ("- rounds\n", ("mapping",)),
        ("rounds: [1\n", (":2", "YAML")),
        ("rounds: 1\nround: 2\nbatch: 3\n", ("and 1 more",)),
    ],
)
def test_wrong_values(run, tmp_path, text, wanted):
    path = written(tmp_path, text)
    refused(run("compare", path), 2, str(path), *wanted)


def test_set(run):
    refused(run("compare", "--set", "rounds"), 2, "--set 'rounds'", "key=value")
    refused(run("compare", "--set", "=3"), 2, "key=value")
    refused(run("compare", "--set", "rounds=[1"), 2, "rounds=[1", "not YAML")
    refused(run("compare", "--set", "lora.rank=4"), 2, "--set: lora.rank is no setting", "known: r, ")
    refused(run("compare", "--set", "train.batch_size=0"), 2, "--set: train.batch_size", "got 0")
    refused(run("compare", "--set", "train=3"), 2, "--set: train")


def test_set_wins_over_the_file(tmp_path):
    path = written(tmp_path, "lora: {r: 2, lora_alpha: 4}\npartition: {name: dirichlet, alpha: 0.1}\n")
    config = load_config(path, ["lora.r=16", "partition.name=iid", "train.learning_rate=1e-4"])
    assert (config.lora.r, config.lora.lora_alpha) == (16, 4)
    assert config.partition is not None and config.partition.name == "iid"
    assert config.train.learning_rate == 1e-4


def test_yaml_builds_no_objects_and_does_not_explode(run, tmp_path):
    path = written(tmp_path, "rounds: 1\nmodel: !!python/object/apply:os.system ['touch hacked']\n")
    refused(run("compare", path), 2, f"{path}:2", "plain YAML")
    path = written(tmp_path, "train: &a {batch_size: 2}\nlora: *a\n")
    refused(run("compare", path), 2, "aliases")
    refused(run("compare", "--set", "model=!!python/name:os.system"), 2, "not YAML")
    refused(run("compare", "--set", "model=*a"), 2, "not YAML")
    refused(run("compare", written(tmp_path, "a: " + "[" * 4000)), 2, "plain YAML")
    refused(run("compare", written(tmp_path, "#" * 1_000_001)), 2, "at most")


def test_missing_or_unreadable_file(run, tmp_path):
    written(tmp_path, "rounds: 1\n")
    refused(run("compare", tmp_path / "mime.yaml"), 2, "No such file", "did you mean 'mine.yaml'?")
    refused(run("compare", tmp_path), 2, str(tmp_path))
    (tmp_path / "mine.yaml").write_bytes(b"model: caf\xe9\n")
    refused(run("compare", tmp_path / "mine.yaml"), 2, "UTF-8")


@pytest.mark.parametrize(
    "setting",
    ["rounds=2020-13-45", "seeds=[-1]", f"seeds=[{2**70}]", "train.learning_rate=.inf", "kd.temperature=.inf"],
)
def test_values_that_no_run_could_use(run, tmp_path, setting):
    refused(run("compare", *small(setting), "--out", tmp_path / "run"), 2, setting.partition("=")[0])


# Data and model ----------------------------------------------------------------------------------------------------


def test_data_faults(run, tmp_path):
    (tmp_path / "texts.csv").write_text("txt,label\nhello,a\nbye,b\n", encoding="utf-8")
    path = written(tmp_path, "data: {train: texts.csv}\n")
    refused(run("compare", path), 3, "texts.csv", "no column 'text'", "found: txt, label", "did you mean 'txt'?")
    path = written(tmp_path, "data: {train: text.csv}\n")
    refused(run("compare", path), 3, "no such file", "did you mean 'texts.csv'?")


def test_impossible_partition(run, tmp_path):
    refused(run("compare", *small(clients=41), "--out", tmp_path / "run"), 3, "41 clients", "at most 40 clients")
    assert not (tmp_path / "run").exists()  # said before anything is written
    mended = run("compare", *small("partition.min_examples=21"), "--out", tmp_path / "run")
    refused(mended, 3, "at most 1 client")


def test_model_faults(run, tmp_path, monkeypatch):
    refused(run("compare", *small(model="./nowhere"), "--out", tmp_path / "run"), 4, "./nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(run("compare", *small(model=tmp_path / "empty"), "--out", tmp_path / "run"), 4, "config.json")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    refused(run("compare", *small(model="nobody/nothing"), "--out", tmp_path / "run"), 4, "nobody/nothing", "Hub")
    refused(run("compare", *small(model="nanno"), "--out", tmp_path / "run"), 4, "did you mean 'nano'?")
    assert time.perf_counter() - start < 10


def test_unreachable_hub_is_noticed_quickly(run, tmp_path, monkeypatch):
    """Nobody has said that there is no network, as on a train: no host is found, and nothing waits long for it."""
    waited: list[float] = []

    def no_host(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_host)
    monkeypatch.setattr(time, "sleep", waited.append)
    said = run("compare", *small(model="nobody/nothing"), "--out", tmp_path / "run")
    refused(said, 4, "nobody/nothing", "no such folder")
    assert sum(waited) < 5, f"{len(waited)} waits of {sum(waited):.0f} s together before a second try"


def test_cut_outside_the_blocks(run, tmp_path):
    words = small("frameworks=[fedllm,split]", "split.cut=5")
    said = run("compare", *words, "--out", tmp_path / "run")
    refused(said, 4, "split.cut is 5", "4 blocks", "0 to 4")
    assert "fedllm" not in said.out, "said only after another framework has run"


def test_target_modules_that_match_nothing(run, tmp_path):
    said = run("compare", *small("lora.target_modules=[q_proj]"), "--out", tmp_path / "run")
    refused(said, 4, "q_proj", "match nothing", "'c_attn'")


# Run folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that the command line has made, with `--json`; what it printed lies beside it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = ["compare", *small("frameworks=[fedllm,local]"), "--out", str(folder), "--json"]
    done = subprocess.run([sys.executable, "-m", "fedtrio.cli", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout, encoding="utf-8")
    (folder.parent / "stderr").write_text(done.stderr, encoding="utf-8")
    return folder


def test_what_is_written(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "results.json", "report.html", "ledger.jsonl"}
    adapters = {
        f"{name}/adapter/adapter_model.safetensors" for name in ("fedllm-0", "local-0/sites/0", "local-0/sites/1")
    }
    assert wanted | adapters <= names
    assert not [name for name in names if name.endswith(".tmp")]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for entry in results["runs"]:
        assert (folder / entry["adapter"] / "adapter_config.json").is_file()
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "FedLLM" in report and "</html>" in report
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["framework"] for line in ledger} == {"fedllm"}


def test_json_is_all_there_is_on_stdout(folder):
    printed = (folder.parent / "stdout").read_text(encoding="utf-8")
    assert len(printed.splitlines()) == 1
    assert json.loads(printed) == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "training examples" in (folder.parent / "stderr").read_text(encoding="utf-8")


def test_resolved_configuration_reloads_to_an_equal_one(folder):
    config = load_config(folder / "config.yaml")
    written_down = Config.model_validate(json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"])
    assert config.model_dump() == written_down.model_dump() == config.resolved().model_dump()
    assert (config.data.max_train, config.rounds, config.train.precision) == (40, 1, "fp32")
    assert config.to_yaml() == (folder / "config.yaml").read_text(encoding="utf-8")
    assert not re.search(r": auto$", config.to_yaml(), re.MULTILINE)


def test_same_folder_again_keeps_finished_runs(run, folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = run("compare", *small("frameworks=[fedllm,local]"), "--out", folder)
    assert said.code == 0, said.err
    assert "round 1" not in said.out, "trained again"
    assert "FedLLM" in said.out and "report.html" in said.out
    changed = [p.name for p, content in before.items() if p.read_bytes() != content]
    assert set(changed) <= {"results.json", "report.html"}  # those may name another environment


def test_folder_of_another_configuration_is_refused(run, folder):
    before = (folder / "results.json").read_bytes()
    said = run("compare", *small("frameworks=[fedllm,local]", "rounds=2", "lora.r=4"), "--out", folder)
    refused(said, 2, "another configuration", "rounds (1 there, 2 here)", "lora.r (8 there, 4 here)", "--out")
    assert (folder / "results.json").read_bytes() == before
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "results.json").write_text("[", encoding="utf-8")
    refused(run("compare", *small(), "--out", folder.parent / "other"), 2, "results.json", "can't be read")


def test_out_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("here already", encoding="utf-8")
    refused(run("compare", *small(), "--out", tmp_path / "file"), 2, "can't be written", "--out")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "here already"


@pytest.mark.parametrize("framework", ["kd", "local"])
def test_sites_that_never_took_part(run, tmp_path, framework):
    """One of two sites in one round: the other has no adapter of its own yet."""
    said = run("compare", *small(f"frameworks=[{framework}]", "participation=0.5"), "--out", tmp_path / "run", "--json")
    assert said.code == 0, said.err
    (entry,) = json.loads(said.out)["runs"]
    assert len(entry["sites"]) == 2
    assert sum(site["client_flops"] > 0 for site in entry["sites"]) == 1


# Exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "wanted"),
    [
        (ConfigError("so not"), 2, "so not"),
        (DataError("no rows"), 3, "no rows"),
        (ModelError("no model"), 4, "no model"),
        (MessageError("no frame"), 5, "no frame"),
        (FedtrioError("odd"), 70, "odd"),
        (ZeroDivisionError("by zero"), 70, "a bug in fedtrio: ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(run, tmp_path, monkeypatch, raised, code, wanted):
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr("fedtrio.workers.run", fail)
    words = ("compare", *small(), "--out", tmp_path / "run")
    refused(run(*words), code, wanted)
    shown = run(*words, "--debug")
    assert shown.code == code and "Traceback" in shown.err and wanted in shown.err


def test_interrupt_keeps_what_is_finished(run, tmp_path, monkeypatch):
    import fedtrio.workers

    real, names = fedtrio.workers.run, []

    def once(config: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        if names == ["fedllm", "local"]:
            raise KeyboardInterrupt
        return real(config, name, *rest)

    monkeypatch.setattr("fedtrio.workers.run", once)
    words = ("compare", *small("frameworks=[fedllm,local]"), "--out", tmp_path / "run", "--json")
    refused_once = run(*words)
    assert refused_once.code == 130 and refused_once.out == ""
    kept = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [entry["framework"] for entry in kept] == ["fedllm"]
    again = json.loads(run(*words).out)["runs"]
    assert [entry["framework"] for entry in again] == ["fedllm", "local"] and again[0] == kept[0]
    assert names == ["fedllm", "local", "local"]
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(ledger) == len(set(ledger)) == 4  # up and down for each of two sites
