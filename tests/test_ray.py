"""Sites in workers of a Ray cluster of two nodes: the same bits, whoever is killed. `make test-engines`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from same import timeless

from fedtrio.bench import Bench
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.doctor import Patient, examine
from fedtrio.errors import ConfigError, DataError, WireError
from fedtrio.run import _wire, run
from fedtrio.wires.loopback import Loopback
from fedtrio.wires.ray import Ray, SiteWorker, connect

ray = pytest.importorskip("ray", reason="pip install 'fedtrio[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.engines

SMALL = [
    "data.max_train=96", "data.max_test=20", "data.max_public=16", "rounds=3", "threads=1", "train.precision=fp32",
    "clients=4", "partition={name: iid}", "kd.temperature=1.0", "split.labels=client", "train.pad_to_multiple_of=1",
]  # fmt: skip
SITES = [f"client-{n}" for n in range(1, 5)]


def config(*more: str) -> Any:
    return load_config(settings=[*SMALL, *more])


def told(folder: Path) -> tuple[Any, str]:
    """What must be the same: results without seconds, adapters' hashes among them, and the ledger's bytes."""
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]

    return timeless(runs), (folder / "ledger.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each: two workers never share one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = cluster_utils.Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def address(cluster: Any) -> str:
    return cluster.address


@pytest.fixture
def wire(address: str) -> str:
    return f"wire={{name: ray, workers: 2, address: '{address}'}}"


# The same bits --------------------------------------------------------------------------------------------------------


def test_two_nodes_give_the_same_bits(wire: str, tmp_path: Path) -> None:
    every = "frameworks=[fedllm,kd,split,local]"
    busy = []

    def on_round(framework: str, seed: int, entry: Any) -> None:
        busy.append(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))

    compare(config(every), tmp_path / "loopback")
    compare(config(every, wire), tmp_path / "ray", on_round)
    assert told(tmp_path / "loopback") == told(tmp_path / "ray")
    assert max(busy) == 2 and len([node for node in ray.nodes() if node["Alive"]]) == 2
    for number in range(4):  # what a site keeps to itself is here, though it was learnt there
        place = f"local-0/sites/{number}/adapter/adapter_model.safetensors"
        assert (tmp_path / "loopback" / place).read_bytes() == (tmp_path / "ray" / place).read_bytes()


class Broken(Exception):
    """Raised in the middle of a run."""


def test_one_wire_goes_on_where_another_broke_off(wire: str, tmp_path: Path) -> None:
    """With sites that remember; and all workers are killed once between two rounds, which costs nothing."""

    def break_off(framework: str, seed: int, entry: Any) -> None:
        if entry["round"] == 1:
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
        if entry["round"] == 2:
            raise Broken

    compare(config("frameworks=[kd]"), tmp_path / "whole")
    with pytest.raises(Broken):
        compare(config("frameworks=[kd]", wire), tmp_path / "run", break_off)
    assert are_gone()  # an error ends them too
    compare(config("frameworks=[kd]"), tmp_path / "run")
    assert told(tmp_path / "whole") == told(tmp_path / "run")


# Killed workers -------------------------------------------------------------------------------------------------------


def workers() -> list[int]:
    """Processes of workers."""
    names = {process.pid: (process.info["cmdline"] or [""])[0] for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, name in names.items() if name.startswith(f"ray::{SiteWorker.__name__}")]


def are_gone() -> bool:
    """Whether no worker is left; one that was ended may need a moment."""
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not workers()


class Mute(Loopback):
    """Sites that do not hear what is said in one round."""

    def __init__(self, sites: Any, mute: set[str], round: int) -> None:
        super().__init__(sites)
        self._mute, self._in, self._round = mute, round, 0

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        super().start_round(run, round, deadline)
        self._round = round

    def exchange(self, frames: Any) -> Iterator[tuple[str, bytes]]:
        mute = self._mute if self._round == self._in else set()
        return super().exchange((site, frame) for site, frame in frames if site not in mute)


def killed_in_round_2(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The worker that is the first to answer in round 2 is killed at once; its sites are entered in the list."""
    killed: list[set[str]] = []
    exchange, start_round = Ray.exchange, Ray.start_round
    pids: dict[str, int] = {}

    def start(self: Any, run: str, round: int, deadline: float | None) -> None:
        start_round(self, run, round, deadline)
        for worker in self._workers:
            pid = ray.get(worker.actor.__ray_call__.remote(lambda actor: os.getpid()))
            pids.update(dict.fromkeys(worker.sites, pid))

    def kill(self: Any, frames: Any) -> Iterator[Any]:
        for site, answer in exchange(self, frames):
            if self._round == 2 and not killed:
                os.kill(pids[site], signal.SIGKILL)
                killed.append({other for other in pids if pids[other] == pids[site]})
            yield site, answer

    monkeypatch.setattr(Ray, "start_round", start)
    monkeypatch.setattr(Ray, "exchange", kill)
    return killed


REMEMBERING = ["fedllm.keep_optimizer=true", "wire.up=topk:0.2", "train.epochs=4"]


@pytest.mark.parametrize(("framework", "more"), [("fedllm", REMEMBERING), ("split", [])])
def test_a_killed_worker_loses_its_sites_for_that_round_only(
    wire: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, more: list[str]
) -> None:
    """The others end the round, and all are there in the next, with their memories: moments and feedback."""
    name = [f"frameworks=[{framework}]"]
    killed = killed_in_round_2(monkeypatch)
    found = run(config(*name, wire, *more), framework, out=tmp_path / "killed")
    assert [event["event"] for event in found["events"]] == ["lost"] * len(found["events"])
    lost = {event["site"] for event in found["events"]}
    assert all(event["reason"].startswith("its worker died: ") for event in found["events"])
    assert lost and lost < killed[0] if framework == "fedllm" else lost == killed[0]
    assert {event["round"] for event in found["events"]} == {2} and [e["round"] for e in found["curve"]] == [1, 2, 3]

    made: Callable[..., Any] = _wire
    monkeypatch.setattr("fedtrio.run._wire", lambda *a: Mute(made(*a)._sites, lost, 2))
    silent = run(config(*name, *more), framework, out=tmp_path / "silent")
    assert found["adapter_sha256"] == silent["adapter_sha256"]
    monkeypatch.setattr("fedtrio.run._wire", made)
    assert run(config(*name, *more), framework, out=tmp_path / "whole")["adapter_sha256"] != found["adapter_sha256"]


class Nothing:
    """The memory of a site that has none."""

    def add(self, round: int, version: bytes) -> None: ...

    def saved(self) -> dict[int, bytes]:
        return {}


ONE_CORE = {"num_cpus": 1}


class Sleepy:
    """A site that says its pid, and sleeps when it is told to."""

    def answer(self, frame: bytes) -> bytes:
        time.sleep(60 if frame == b"sleep" else 0)
        return str(os.getpid()).encode()

    def reset(self) -> None: ...

    def recall(self, versions: Any) -> None: ...

    def learnt(self) -> bytes:
        return b""


def test_a_worker_that_is_late_is_started_again(address: str) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    wire = Ray(lambda names: {name: Sleepy() for name in names}, {"a": Nothing(), "b": Nothing()}, 2, ONE_CORE, address)
    wire.start_round("run-0", 1, None)
    first = dict(wire.exchange([("a", b""), ("b", b"")]))
    wire.start_round("run-0", 2, 1.0)
    assert dict(wire.exchange([("a", b""), ("b", b"sleep")])) == {"a": first["a"]}
    assert wire.reasons == {"b": "its worker was not done at the round's deadline"}
    wire.start_round("run-0", 3, None)
    third = dict(wire.exchange([("a", b""), ("b", b"")]))
    assert third["a"] == first["a"] and third["b"] not in (None, first["b"])
    wire.close()


def test_a_node_that_is_lost_leaves_its_sites_silent_till_there_is_room(cluster: Any, address: str) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    nodes = [cluster.add_node(num_cpus=1, resources={"spare": 1}) for _ in range(2)]
    asked, memories = {"num_cpus": 1, "spare": 1}, {"a": Nothing(), "b": Nothing()}
    wire = Ray(lambda names: {name: Sleepy() for name in names}, memories, 2, asked, address, patience=30)
    frames = [("a", b""), ("b", b"")]
    wire.start_round("run-0", 1, None)
    assert dict(wire.exchange(frames)).keys() == {"a", "b"}
    there = workers()
    cluster.remove_node(nodes[0], allow_graceful=False)
    while len(workers()) == len(there):  # a worker ends soon after its node
        time.sleep(0.1)
    wire._patience = 2.0
    for round in (2, 3):
        wire.start_round("run-0", round, None)
        heard = dict(wire.exchange(frames))
        assert sum(answer is not None for answer in heard.values()) == 1
    nodes[0] = cluster.add_node(num_cpus=1, resources={"spare": 1})
    deadline = time.monotonic() + 60
    while None in dict(wire.exchange(frames)).values():
        assert time.monotonic() < deadline
        wire.start_round("run-0", 4, None)
        time.sleep(0.5)
    wire.close()
    for node in nodes:
        cluster.remove_node(node)
    while sum(node["Alive"] for node in ray.nodes()) > 2:
        time.sleep(0.1)


# What is wrong is said ------------------------------------------------------------------------------------------------


def of_two(address: str, resources: dict[str, float], workers: int = 2) -> Ray:
    return Ray(dict, {"a": Nothing(), "b": Nothing()}, workers, resources, address, patience=2.0)


def test_what_can_never_be_had_is_refused_at_once(address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"2 workers with num_gpus 1 each .* 2 nodes with num_cpus 2 in all, room for 0"
    ):
        of_two(address, {"num_gpus": 1})
    with pytest.raises(ConfigError, match=r"num_cpus 1, special 1 each .* room for 0"):
        of_two(address, {"num_cpus": 1, "special": 1})
    with pytest.raises(ConfigError, match=r"2 workers with num_cpus 2 each"):  # both cores, but not on one node
        of_two(address, {"num_cpus": 2})


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"wire.address is 'head': write host:port"):
        connect("head")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WireError, match=f"no Ray cluster at 127.0.0.1:{port}: Connection refused"):
        connect(f"127.0.0.1:{port}")


def test_the_doctor_knows_the_cluster(wire: str) -> None:
    patient = Patient(settings=[*SMALL, wire])
    found = {finding.check: finding for finding in examine(patient)}
    assert found["wire"].state == "ok" and "room for 2 with num_cpus 1 each" in found["wire"].text


def test_what_others_hold_is_not_waited_for_without_end(address: str) -> None:
    others = ray.remote(num_cpus=1)(type("Other", (), {"there": lambda self: True})).remote()
    assert ray.get(others.there.remote())
    wire = of_two(address, {"num_cpus": 1})
    with pytest.raises(WireError, match=r"1 of 2 workers did not start within 2 s: each asks for num_cpus 1; .*free"):
        wire.start_round("run-0", 1, None)
    wire.close()
    ray.kill(others)


def test_a_node_without_fedtrio_is_named(cluster: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "fedtrio").mkdir()
    (tmp_path / "fedtrio" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'fedtrio'\")\n")
    node = cluster.add_node(num_cpus=1, resources={"bare": 1}, env_vars={"PYTHONPATH": str(tmp_path)})
    wire = Ray(dict, {"a": Nothing()}, 1, {"num_cpus": 1, "bare": 1}, address)
    with pytest.raises(WireError, match=r"on node [\d.]+: .*No module named 'fedtrio'; install the same fedtrio"):
        wire.start_round("run-0", 1, None)
    wire.close()
    cluster.remove_node(node)


def test_a_node_without_the_data_is_named(wire: str, tmp_path: Path) -> None:
    """The driver has read them already; a worker on another machine looks for them at the same place."""
    (tmp_path / "train.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    own = config("frameworks=[fedllm]", wire, f"data={{train: {tmp_path}/train.csv, test: 0.2, public: 0.2}}")
    bench = Bench(own)
    bench.model(0), bench.encoded
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match=r"on node \S+: \S+train.csv: no such file"):
        run(own, "fedllm", bench=bench)
    assert are_gone()


# A cluster of its own -------------------------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> subprocess.Popen[str]:
    words = [*SMALL, "frameworks=[fedllm]", "wire={name: ray, workers: 1}", *more]
    line = [sys.executable, "-m", "fedtrio.cli", "compare", *(f"--set={word}" for word in words), "--out", str(folder)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_of(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_cluster_of_its_own_is_quiet_and_ends_with_the_command(tmp_path: Path) -> None:
    running = command(tmp_path / "run", "rounds=1", "wire.workers=null")
    seen: set[int] = set()
    while running.poll() is None:
        with suppress(psutil.NoSuchProcess):
            seen |= {process.pid for process in psutil.Process(running.pid).children(recursive=True)}
        time.sleep(0.2)
    assert running.stdout is not None and running.stderr is not None
    assert running.returncode == 0 and running.stderr.read() == "" and "Ray" not in running.stdout.read()
    assert len(seen) > 5 and not left_of(sorted(seen))


def test_a_signal_ends_the_cluster_too(tmp_path: Path) -> None:
    running = command(tmp_path / "run")
    assert running.stdout is not None and running.stderr is not None
    for line in running.stdout:
        if "round 1" in line:
            break
    seen = [process.pid for process in psutil.Process(running.pid).children(recursive=True)]
    running.send_signal(signal.SIGTERM)
    said = running.stderr.read()
    assert running.wait(60) == 143 and "fedtrio resume" in said and len(said.split("\n")) <= 3
    assert len(seen) > 5 and not left_of(seen)
