"""Broken off and gone on: every run ends in the same bits, whatever was killed, damaged or spread over processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from same import timeless

from fedtrio.checkpoint import Journal, Memory, pack_tree, unpack_tree
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError
from fedtrio.frameworks import FedLLM
from fedtrio.ledger import Ledger
from fedtrio.run import run

SMALL = [
    "data.max_train=90", "data.max_test=20", "data.max_public=16", "rounds=3", "threads=1", "train.precision=fp32",
    "clients=3", "partition={name: iid}", "kd.temperature=1.0", "train.pad_to_multiple_of=1",
]  # fmt: skip
FEDERATED = ("fedllm", "kd", "split")


def config(*more: str) -> Any:
    return load_config(settings=[*SMALL, *more])


def told(folder: Path) -> tuple[list[Any], str]:
    """What must be the same: results without seconds, and the ledger's bytes."""
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]

    return timeless(runs), (folder / "ledger.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All frameworks, never broken off."""
    folder = tmp_path_factory.mktemp("whole")
    runs = compare(config("frameworks=[fedllm,kd,split,local]"), folder, jobs=1)["runs"]
    assert ["right" in run for run in runs] == [True, True, True, False]
    return folder


def differing(a: Any, b: Any, path: str = "") -> None:
    """Fails at the first place where two trees differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            differing(a.get(key), b.get(key), f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            differing(*pair, f"{path}/{index}")
    else:
        assert a == b, path


# Spread over processes ------------------------------------------------------------------------------------------------


def test_two_jobs_give_the_same_bits(whole: Path, tmp_path: Path) -> None:
    seen = []
    compare(config("frameworks=[fedllm,kd,split,local]"), tmp_path, lambda *entry: seen.append(entry), jobs=2)
    differing(told(whole), told(tmp_path))
    assert len(seen) == 12 and {name for name, _, _ in seen} == {"fedllm", "kd", "split", "local"}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.faults), 3])
def test_the_process_wire_gives_the_same_bits(whole: Path, tmp_path: Path, workers: int) -> None:
    wire = f"wire={{name: process, workers: {workers}}}"
    results = compare(config("frameworks=[fedllm,kd,split,local]", wire), tmp_path, jobs=1)
    differing(told(whole), told(tmp_path))
    peaks = [site.get("process_peak_bytes") for run in results["runs"] for site in run["sites"]]
    if workers == 3:  # a process for each site: its peak is its own
        assert all(200e6 < peak < 3e9 for peak in peaks)
    else:
        assert peaks == [None] * 12


def test_a_run_broken_off_after_its_last_round_tells_the_same(tmp_path: Path) -> None:
    setting = config("rounds=1")
    first, again = (run(setting, "fedllm", out=tmp_path) for _ in range(2))
    assert first["right"]["texts"] == 20
    differing(timeless(first), timeless(again))


def test_nothing_is_left_running(tmp_path: Path) -> None:
    words = [
        f"--set={word}" for word in [*SMALL, "frameworks=[fedllm]", "rounds=1", "wire={name: process, workers: 2}"]
    ]
    code = "import os; print(os.getsid(0), flush=True)\nfrom fedtrio.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *words, "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # the fork server and its workers share the command's session, and end with it
    deadline = time.monotonic() + 10
    while left := [p for p in psutil.pids() if _session(p) == int(done.stdout.splitlines()[0])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


# Broken off -----------------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from pathlib import Path
import fedtrio.program, fedtrio.checkpoint
from fedtrio.cli import main
point, count = sys.argv.pop(1), int(sys.argv.pop(1))
home, name = {
    "before a site answers": (fedtrio.program.Site, "answer"),
    "before a site commits": (fedtrio.checkpoint.Memory, "commit"),
    "before a round is committed": (fedtrio.checkpoint.Journal, "commit"),
    "before the journal's line": (fedtrio.checkpoint, "append_line"),
    "before a file is renamed": (fedtrio.checkpoint, "_sync_folder"),
}[point]
real, seen = getattr(home, name), 0
def counted(*args, **kwargs):
    global seen
    seen += 1
    if seen == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(home, name, counted)
main()
"""
POINTS = [
    ("before a site answers", 2), ("before a site answers", 9), ("before a site answers", 14),
    ("before a site commits", 1), ("before a site commits", 5), ("before a site commits", 7),
    ("before a round is committed", 2), ("before a round is committed", 9),
    ("before the journal's line", 4), ("before a file is renamed", 8),
]  # fmt: skip


def killed(folder: Path, framework: str, point: str, count: int) -> None:
    words = [f"--set={word}" for word in [*SMALL, f"frameworks=[{framework}]"]]
    command = [sys.executable, "-c", KILLER, point, str(count), "compare", "--jobs=1", *words, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


@cache
def alone(framework: str, whole: Path) -> tuple[list[Any], str]:
    runs, ledger = told(whole)
    lines = [line + "\n" for line in ledger.splitlines() if json.loads(line)["framework"] == framework]
    return [entry for entry in runs if entry["framework"] == framework], "".join(lines)


@pytest.mark.parametrize(
    ("framework", "point", "count"),
    [("kd", "before a site commits", 5), ("split", "before a site answers", 9)],
)
def test_killed_and_resumed(whole: Path, tmp_path: Path, framework: str, point: str, count: int) -> None:
    """kill -9 in the second round; `fedtrio resume` ends in the same hash, ledger and counts."""
    killed(tmp_path / "run", framework, point, count)
    resumed(tmp_path / "run", whole, framework)


@pytest.mark.faults
@pytest.mark.parametrize("framework", FEDERATED)
@pytest.mark.parametrize(("point", "count"), POINTS)
def test_killed_at_any_point(whole: Path, tmp_path: Path, framework: str, point: str, count: int) -> None:
    killed(tmp_path / "run", framework, point, count)
    resumed(tmp_path / "run", whole, framework)


def resumed(folder: Path, whole: Path, framework: str) -> None:
    command = [sys.executable, "-m", "fedtrio.cli", "resume", str(folder), "--jobs=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    differing(alone(framework, whole), told(folder))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(whole: Path, tmp_path: Path, sent: signal.Signals) -> None:
    words = [f"--set={word}" for word in [*SMALL, "frameworks=[fedllm]"]]
    command = [sys.executable, "-m", "fedtrio.cli", "compare", "--jobs=1", *words, "--out", str(tmp_path / "run")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stderr is not None
    for line in running.stdout:
        if "round 1" in line:
            break
    running.send_signal(sent)
    said = running.stderr.read()
    assert running.wait(30) == 128 + sent
    assert f"fedtrio resume {tmp_path / 'run'}" in said and "Traceback" not in said and len(said.splitlines()) <= 2
    resumed(tmp_path / "run", whole, "fedllm")


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedtrio.cli", "resume", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no run folder" in done.stderr and len(done.stderr.splitlines()) <= 2


# Sites whose memory is kept elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_site_made_anew_each_round_is_the_same_site(tmp_path: Path, on_disk: bool) -> None:
    """As after the death of its worker: what it has learnt is kept, packed, and brought to the next one."""
    method = FedLLM(keep_optimizer=True)
    whole = tiny.play(method, tiny.adapted("gpt2"), sizes=(5, 3), n=3)
    lab = tiny.lab(tiny.adapted("gpt2"), rounds=3)
    state, ledger = method.setup(lab), Ledger()
    kept = {f"site-{n}": Memory(tmp_path / str(n) if on_disk else None) for n in (1, 2)}
    for round in (1, 2, 3):
        sites, wire = tiny.federation(method, lab, (5, 3))
        for name, site in sites.items():
            site.recall(kept[name].saved())
        tiny.rounds(method, lab, wire, 1, ledger, state)
        for name, site in sites.items():
            learnt = site.learnt()
            kept[name].add(round, learnt)
            assert len(learnt) > 1000 and site.learnt() == b""  # moments are in it; and it is told once
    assert tiny.same(whole.state["adapter"], state["adapter"])
    assert [sorted(memory.saved()) for memory in kept.values()] == [[2, 3], [2, 3]]
    forgetful = tiny.play(FedLLM(), tiny.adapted("gpt2"), sizes=(5, 3), n=3)
    assert not tiny.same(forgetful.state["adapter"], state["adapter"])


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is missing: pip install 'fedtrio\[ray\]'"):
        run(config("wire.name=ray", "clients=1"), "fedllm")
    with pytest.raises(ConfigError, match="'CPU' is no resource of Ray; did you mean 'num_cpus'"):
        config("wire={name: ray, resources: {CPU: 2}}")


def test_a_run_may_go_on_over_another_wire(tmp_path: Path) -> None:
    compare(config("rounds=1", "frameworks=[fedllm]"), tmp_path)
    other = "wire={name: ray, workers: 4, address: 'head:6379', resources: {num_gpus: 1, special: 2}}"
    assert compare(config("rounds=1", "frameworks=[fedllm]", other), tmp_path)["runs"][0]["rounds"] == 1  # kept


# The journal ----------------------------------------------------------------------------------------------------------


def test_a_tree_comes_back() -> None:
    groups, facts = unpack_tree(pack_tree({"g": {"a": torch.ones(2), "b": torch.arange(2)}, "h": {}}, {"n": [1, "é"]}))
    assert groups.keys() == {"g"} and torch.equal(groups["g"]["b"], torch.arange(2)) and facts == {"n": [1, "é"]}


def test_a_tree_may_hold_a_tensor_twice() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    found, _ = unpack_tree(pack_tree({"a": {"x": whole}, "b": {"x": whole, "y": whole.T[1:]}}, {}))
    assert torch.equal(found["a"]["x"], whole) and torch.equal(found["b"]["x"], whole)
    assert torch.equal(found["b"]["y"], whole.T[1:])


def test_the_last_two_rounds_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.latest() is None
    for round in (1, 2, 3):
        journal.commit(round, {"g": {"x": torch.tensor([float(round)])}}, {"r": round})
    assert sorted(p.name for p in tmp_path.glob("round-*")) == ["round-00002.safetensors", "round-00003.safetensors"]
    for before, wanted in ((None, 3), (4, 3), (3, 2)):
        found = journal.latest(before)
        assert found is not None and found[0] == wanted == float(found[1]["g"]["x"]) == found[2]["r"]
    assert journal.latest(2) is None


@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "gone", "torn line", "line of rubbish"])
def test_a_damaged_round_falls_back_to_the_one_before(tmp_path: Path, harm: str) -> None:
    journal = Journal(tmp_path)
    for round in (1, 2):
        journal.commit(round, {"g": {"x": torch.tensor([float(round)])}}, {})
    last, lines = tmp_path / "round-00002.safetensors", tmp_path / "journal.jsonl"
    data = bytearray(last.read_bytes())
    if harm == "flipped bit":
        data[-1] ^= 1
        last.write_bytes(data)
    elif harm == "truncated":
        last.write_bytes(data[:-3])
    elif harm == "gone":
        last.unlink()
    elif harm == "torn line":
        lines.write_bytes(lines.read_bytes()[:-20])
    else:
        lines.write_bytes(lines.read_bytes().replace(b'"round": 2', b"\xff\x00["))
    found = Journal(tmp_path).latest()
    assert found is not None and found[0] == 1 and float(found[1]["g"]["x"]) == 1
    again = Journal(tmp_path)
    again.commit(2, {"g": {"x": torch.tensor([5.0])}}, {})  # and the run goes on from there
    found = again.latest()
    assert found is not None and float(found[1]["g"]["x"]) == 5


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_site_goes_back_with_its_server(tmp_path: Path, on_disk: bool) -> None:
    memory = Memory(tmp_path if on_disk else None)
    assert memory.before(1) == ({}, {})
    for round in (1, 2, 4):
        memory.commit(round, {"adapter": {"x": torch.tensor([float(round)])}}, {"r": round})
    assert memory.before(9)[1] == {"r": 4} and memory.before(4)[1] == {"r": 2}
    memory.commit(4, {"adapter": {"x": torch.tensor([44.0])}}, {"r": 44})
    assert memory.before(5)[1] == {"r": 44} and memory.before(4)[1] == {"r": 2}
